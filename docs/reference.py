"""Tables of options and help texts, made from the classes and commands themselves.

A page says where they go by a comment, which GitHub does not show:

    <!-- options: finetune chat -->      the options of a command, or of one kind of recipe
    <!-- help: finetune chat -->         what `gptsmith finetune chat --help` prints
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx

from gptsmith import cli
from gptsmith.flags import Option, OptionPath, flag_name, format_default, metavar, options_of
from gptsmith.recipes.kinds import FINETUNE
from gptsmith.recipes.options import FinetuneConfig, RecipeConfig

_HELP_COLUMNS = "88"
_LONG = 30  # characters of a default that stays in the text
_NO_LIMIT = 10**9

# Options that a heading has: their class, the one whose equal options the reader knows already, and
# the positional argument. Commands that train come first, the others follow by their module.
OPTIONS: dict[str, tuple[str, type[BaseModel] | None, str]] = {
    "recipe": ("gptsmith.recipes.options:RecipeConfig", None, ""),
    "pretrain": ("gptsmith.recipes.options:PretrainConfig", RecipeConfig, ""),
    "finetune": ("gptsmith.recipes.options:FinetuneConfig", RecipeConfig, ""),
    **{
        f"finetune {kind}": (f"{config.__module__}:{config.__name__}", FinetuneConfig, "")
        for kind, (config, _) in FINETUNE.items()
    },
    "demo": ("gptsmith.demo:DemoConfig", None, ""),
    "prepare": ("gptsmith.data.options:PrepareConfig", None, "sources"),
    "prepare --format chat": ("gptsmith.commands.prepare:PrepareChatConfig", None, "sources"),
    "plan": ("gptsmith.commands.plan:PlanOptions", None, ""),
    "generate": ("gptsmith.commands.generate:GenerateOptions", None, "run"),
    "chat": ("gptsmith.commands.chat:ChatOptions", None, "run"),
    "serve": ("gptsmith.serve.options:ServeOptions", None, "run"),
    "classify": ("gptsmith.evaluate.options:ClassifyOptions", None, "text"),
    "evaluate": ("gptsmith.evaluate.options:EvaluateOptions", None, "run"),
    "import": ("gptsmith.commands.import_model:ImportOptions", None, "source"),
    "export": ("gptsmith.commands.export:ExportOptions", None, "run"),
    "inspect": ("gptsmith.commands.inspect:InspectOptions", None, "path"),
    "recipes": ("gptsmith.commands.recipes:RecipesOptions", None, "name"),
    "doctor": ("gptsmith.commands.doctor:DoctorOptions", None, ""),
}


def config_class(name: str) -> type[BaseModel]:
    """The class of the options of a command or recipe."""
    module, _, cls = OPTIONS[name][0].partition(":")
    found: type[BaseModel] = getattr(import_module(module), cls)
    return found


def option_tables(name: str) -> str:
    """The options of a command or recipe as Markdown. Where options of another class are left out,
    one table has the others; otherwise each section has a heading and a table."""
    _, known, positional = OPTIONS[name]
    options = options_of(config_class(name))
    rows = {
        path: row for path, option in options.items() if (row := _row(path, option, positional))
    }
    if known is not None:
        before = options_of(known)
        same = {path for path, row in rows.items() if _row(path, before.get(path), "") == row}
        return _table(row for path, row in rows.items() if path not in same)
    sections = {path[:-1]: "" for path in rows}
    for path in sections:
        if path:
            about = options[path].help or (options[path].section.__doc__ or "").partition("\n")[0]
            sections[path] = f"### {'.'.join(path)}\n\n{_text(about)}\n\n"
    tables = {at: _table(row for path, row in rows.items() if path[:-1] == at) for at in sections}
    return "\n\n".join(sections[at] + tables[at] for at in sections)


def _table(rows: Iterator[str]) -> str:
    return "\n".join(["| option | value | default | |", "|---|---|---|---|", *rows])


def _row(path: OptionPath, option: Option | None, positional: str) -> str:
    """The row of an option; empty for what is none: a section, or a constant."""
    if option is None or (option.section is not None and not hasattr(option.section, "preset")):
        return ""
    if path == ("stage",):  # the name of the recipe, which is not chosen
        return ""
    about, default = option.help, format_default(option.default)
    if option.field.is_required():
        default = "required"
    elif described := re.search(r"\s*\(default: ((?:[^()]|\([^()]*\))*)\)", about):
        default = described[1] if len(described[1]) < _LONG else ""
        about = about.replace(described[0], "") if default else about
    elif "default:" in about.lower() or option.section is not None:
        default = ""
    flag = path[0].upper() if path == (positional,) else flag_name(path)
    code = re.fullmatch(r"[\w./-]+", default) and default not in ("required", "none", "yes", "no")
    cells = [f"`{flag}`", _values(option), f"`{default}`" if code else _text(default), _text(about)]
    return f"| {' | '.join(cells)} |"


def _values(option: Option) -> str:
    if option.section is not None:
        return "PRESET"
    if set(option.kinds) == {bool}:
        return "yes, no"
    text = metavar(option.item or option.field.annotation).replace("|", ", ")
    limits = "".join(
        f" {sign}\N{NO-BREAK SPACE}{value:,.10g}"
        for limit in option.field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if isinstance(value := getattr(limit, name, None), int | float) and value < _NO_LIMIT
    )
    return _text(text + limits) + (" ..." if option.item else "")


def _text(text: str) -> str:
    """Plain text with `code`, as Markdown in a cell of a table."""
    parts = re.split(r"(`[^`]*`)", text)
    for i, part in enumerate(parts):
        plain = part if i % 2 else re.sub(r"([\\*_<>\[\]{}~#$])", r"\\\1", part)
        parts[i] = plain.replace("|", r"\|")
    return "".join(parts)


def help_text(name: str) -> str:
    """What `gptsmith NAME --help` prints, below the command, as Markdown."""
    words, printed = [*name.split(), "--help"], io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _HELP_COLUMNS
    try:
        with contextlib.redirect_stdout(printed):
            code = cli.main(words)
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    assert code == 0, name
    return f"```console\n$ gptsmith {' '.join(words)}\n{printed.getvalue()}```"


_MAKERS: Mapping[str, Any] = {"options": option_tables, "help": help_text}


def with_reference(text: str) -> str:
    """The text of a page with the tables and help texts that its comments name."""
    return re.sub(
        r"^<!-- (options|help): ?(.*?) ?-->$",
        lambda match: _MAKERS[match[1]](match[2]),
        text,
        flags=re.MULTILINE,
    )


def read_page(app: Sphinx, docname: str, content: list[str]) -> None:
    """Handler of `source-read`."""
    content[0] = with_reference(content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True}

"""A configuration class as command-line flags: the parser, its help, and what field types allow.

argparse does the parsing and keeps silent about flags that were not given, which is what
`settings.load` needs to lay the command line over a recipe.
"""

import argparse
import ast
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Setting(NamedTuple):
    """One value that somebody wrote, where it goes, and where it was written."""

    path: tuple[str, ...]
    value: Any
    place: str


def read_flags(
    config_class: type[BaseModel],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: str | None,
) -> tuple[list[Setting], list[str]]:
    """The settings that the flags make, and the words that are no flags. `--help` prints and exits.

    Underscores and hyphens are the same in flag names; `--` ends the flags.
    """
    parser = _parser(config_class, prog, description, positional)
    argv = list(argv)
    stop = argv.index("--") if "--" in argv else len(argv)
    hyphens = [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), a) for a in argv[:stop]]
    values, rest = parser.parse_known_args(_switches(parser, hyphens))
    for word in rest:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            flags = [flag[2:] for a in parser._actions for flag in a.option_strings if flag != "-h"]
            near = nearest(name.lstrip("-"), flags)
            hint = f": did you mean --{near}?" if near else " (see --help)"
            raise ValueError(f"unknown option {name}{hint}")
    settings = [
        Setting(tuple(dest.split(".")), value, flag_name(dest.removesuffix(".preset").split(".")))
        for dest, value in vars(values).items()
    ]
    return settings, rest + argv[stop + 1 :]


def _switches(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """`--flag false` and `--flag=false`, as in YAML, become `--no-flag`."""
    known = {
        flag: action.option_strings
        for action in parser._actions
        if isinstance(action, argparse.BooleanOptionalAction)
        for flag in action.option_strings
    }
    out: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag in known and value.lower() in ("true", "false"):
            out.append(known[flag][value.lower() == "false"])
        elif out and out[-1] in known and word.lower() in ("true", "false"):
            out[-1] = known[out[-1]][word.lower() == "false"]
        else:
            out.append(word)
    return out


def flag_name(path: Sequence[str]) -> str:
    return "--" + ".".join(path).replace("_", "-")


def nearest(word: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant; of `section.field` the field alone counts as well."""
    whole = {name.rpartition(".")[2]: name for name in reversed(names)} | {n: n for n in names}
    begun = [name for name in whole if name.startswith(word)] if len(word) > 2 else []
    # below 0.7, the suggestions are ones that nobody meant
    near = [word] if word in whole else begun or difflib.get_close_matches(word, whole, 1, 0.7)
    return whole[near[0]] if near else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (a value that starts with a dash is written --name=VALUE)"
        raise ValueError(message.removeprefix("argument "))


def _parser(
    config_class: type[BaseModel], prog: str, description: str, positional: str | None
) -> argparse.ArgumentParser:
    words = "[RECIPE.yaml]"
    if positional is not None:
        field = fields(config_class)[positional]
        words = positional.upper() + ("..." if list_item(field.annotation) else "")
        words = words if field.is_required() else f"[{words}]"
        about = _field_docs(config_class).get(positional, "")
        description += f" {words}: {about}" if about else ""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {words} [options]",
        description=description.replace("%", "%%"),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
    )
    _add_flags(parser, parser, config_class, None, (), positional)
    return parser


def _add_flags(
    parser: argparse.ArgumentParser,
    group: argparse._ActionsContainer,
    config_class: type[BaseModel],
    base: BaseModel | None,
    above: tuple[str, ...],
    positional: str | None,
) -> None:
    """Flags for the fields of one section; `base` holds its defaults where the class above does."""
    docs = _field_docs(config_class)
    sections: list[tuple[str, type[BaseModel], Any]] = []
    for name, field in config_class.model_fields.items():
        below = section(field.annotation)
        default = _default(field) if base is None else getattr(base, name)
        name = field.alias or name
        if below is not None:
            sections.append((name, below, default if isinstance(default, below) else None))
        elif above or name != positional:
            group.add_argument(
                flag_name((*above, name)),
                **_options(field, default, docs.get(name, "")),
                dest=".".join((*above, name)),
            )
    for name, below, start in sections:
        path = (*above, name)
        text = docs.get(name) or (inspect.getdoc(below) or "").split("\n")[0]
        titled = parser.add_argument_group(".".join(path), text.replace("%", "%%"))
        if hasattr(below, "preset"):
            titled.add_argument(
                flag_name(path),
                dest=".".join((*path, "preset")),
                metavar="PRESET",
                help=f"start from a preset: {', '.join(_presets(below))}",
            )
        _add_flags(parser, titled, below, start, path, None)


def _presets(config_class: type[BaseModel]) -> list[str]:
    """The names in the PRESETS table that stands beside a class with presets."""
    return list(getattr(inspect.getmodule(config_class), "PRESETS", []))


def _options(field: FieldInfo, default: Any, text: str) -> dict[str, Any]:
    """How argparse is told about a plain field."""
    if field.is_required():
        text += " (required)"
    elif "default:" not in text.lower():  # else the text says what None stands for
        text += f" (default: {_show(default)})"
    options: dict[str, Any] = {"help": text.strip().replace("%", "%%")}
    if set(choices(field.annotation)) == {bool}:
        return options | {"action": argparse.BooleanOptionalAction}
    options["metavar"] = _metavar(field.annotation)
    if list_item(field.annotation) is not None:
        options["action"] = "append"
    elif get_origin(field.annotation) is tuple:
        options["nargs"] = len(get_args(field.annotation))
    return options


def _metavar(annotation: Any) -> Any:
    if get_origin(annotation) is tuple and ... not in get_args(annotation):
        return tuple(_metavar(kind) for kind in get_args(annotation))
    words = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}
    kinds = choices(list_item(annotation) or annotation)
    return "|".join(words.get(kind, str(kind)) for kind in kinds)


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _show(default: Any) -> str:
    if isinstance(default, tuple | list):
        return " ".join(str(value) for value in default) or "none"
    words = {None: "none", True: "yes", False: "no", "": "empty"}
    return (
        words.get(default, str(default)) if isinstance(default, bool | str | None) else str(default)
    )


def _field_docs(config_class: type[BaseModel]) -> dict[str, str]:
    """Help text by written name: the description, or the string under the field in the source."""
    docs: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return {
        field.alias or name: field.description or docs.get(name, "")
        for name, field in config_class.model_fields.items()
    }


# --- what a class and an annotation allow --------------------------------------------------------


def fields(config_class: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the name that people write: its alias, where Python keeps a word for itself.

    `base: Path = Field(alias="from")` is `--from` and, in a recipe, `from:`.
    """
    return {field.alias or name: field for name, field in config_class.model_fields.items()}


def choices(annotation: Any) -> list[Any]:
    """The types and literal values that an annotation allows, None left out."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [kind for arg in get_args(annotation) for kind in choices(arg)]
    if origin is Annotated:
        return choices(get_args(annotation)[0])
    if origin is Literal:
        return list(get_args(annotation))
    return [] if annotation in (None, types.NoneType) else [annotation]


def takes_none(annotation: Any) -> bool:
    union = get_origin(annotation) in (Union, types.UnionType)
    return union and types.NoneType in get_args(annotation)


def section(annotation: Any) -> type[BaseModel] | None:
    """The configuration class of a nested section, None for a plain value."""
    for kind in choices(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def list_item(annotation: Any) -> Any:
    """X of `tuple[X, ...]` or `list[X]`, None for what holds one value or a fixed number."""
    for kind in choices(annotation):
        arguments = get_args(kind)
        if get_origin(kind) is list or (get_origin(kind) is tuple and arguments[-1] is ...):
            return arguments[0]
    return None

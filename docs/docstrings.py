"""The docstrings of gptsmith, which are plain text, as reStructuredText.

What a reader of the source sees as code or as a table (indented lines, lines with columns) stays as
it is written; `names in backticks` become code; everything else is text, whatever it contains.
Parameters are marked where their description begins: `mask: default config.mask`.
"""

import inspect
import re
import textwrap
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.rst import escape

_COLUMNS = re.compile(r"^\S.*\S {2,}\S", re.MULTILINE)
_ITEM = re.compile(r"^[-*] ")


def as_rst(text: str, parameters: tuple[str, ...] = ()) -> str:
    """The reStructuredText of a docstring. parameters: names of the arguments it may describe."""
    if not text.strip():
        return ""
    blocks = re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n"))
    return "\n\n".join(_block(block, parameters) for block in blocks)


def _block(block: str, parameters: tuple[str, ...]) -> str:
    lines = block.splitlines()
    if all(line.startswith("  ") for line in lines) or _COLUMNS.search(block):
        return "::\n\n" + textwrap.indent(textwrap.dedent(block), "   ")
    if _ITEM.match(block):  # lines that continue an item are indented
        items = re.split(r"^[-*] ", block, flags=re.MULTILINE)[1:]
        return "\n".join("- " + _inline(" ".join(item.split()), parameters) for item in items)
    return _inline(" ".join(line.strip() for line in lines), parameters)


def _inline(text: str, parameters: tuple[str, ...]) -> str:
    """One line, with code between backticks."""
    if parameters:
        name = "|".join(map(re.escape, parameters))
        described = rf"(?:^|(?<=[.;:)] ))((?:{name})(?:(?:,| and) (?:{name}))*): "
        text = re.sub(described, lambda match: f"`{match[1]}`: ", text)
    parts = re.split(r"`([^`\n]+)`", text)
    for i, part in enumerate(parts):
        parts[i] = f"\\ ``{part}``\\ " if i % 2 else escape(part)
    return "".join(parts).removeprefix("\\ ")


def process_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Handler of `autodoc-process-docstring`."""
    parameters: tuple[str, ...] = ()
    if callable(obj):
        try:
            parameters = tuple(inspect.signature(obj).parameters)
        except (TypeError, ValueError):
            parameters = ()
    lines[:] = [*as_rst("\n".join(lines), parameters).splitlines(), ""]


def process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Handler of `autodoc-process-signature`: the fields of a configuration are listed below it."""
    if what == "class" and issubclass(obj, BaseModel):
        return "(**fields)", ""
    return None


def skip_member(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Handler of `autodoc-skip-member`: what pydantic and NamedTuple add by themselves."""
    generated = str(getattr(obj, "__doc__", "")).startswith("Alias for field number")
    return True if name == "model_config" or generated else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True}

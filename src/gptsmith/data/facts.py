"""Facts about Python that the built-in chat set explains: first lines of its documentation."""

from __future__ import annotations

import re
import sys
import zlib
from functools import cache

from gptsmith.data.documents import Document
from gptsmith.data.stdlib import pydocs

FUNCTIONS = 120  # explained in training
LINE = 72  # characters; what evaluation generates ends after 80 tokens

# Modules that people ask about; those whose documentation begins with a short line are explained.
_MODULES = [
    "abc", "argparse", "base64", "bisect", "bz2", "calendar", "cmd", "configparser", "contextlib",
    "copy", "csv", "datetime", "dis", "email", "fnmatch", "fractions", "getpass", "gettext", "glob",
    "gzip", "heapq", "hmac", "html", "inspect", "locale", "operator", "os", "pickle", "pprint",
    "profile", "random", "re", "secrets", "shelve", "shutil", "socket", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "traceback", "types",
    "uuid", "warnings", "webbrowser", "xml", "zipfile",
]  # fmt: skip


@cache
def functions() -> list[tuple[str, str]]:
    """Functions and the first lines of their docstrings, in the order of a hash."""
    found = []
    for document in pydocs():
        module = document.place
        if re.fullmatch(r"[a-z]\w*", module):  # no packages, no private modules, no topics
            pattern = r"^([a-z]\w*)\(.*\)\n    (\S.{,58}\.)$"
            for function, line in re.findall(pattern, text(document), re.MULTILINE):
                found.append((f"{module}.{function}", line))
    return sorted(found, key=lambda fact: zlib.crc32(fact[0].encode()))


@cache
def modules() -> list[tuple[str, str]]:
    """Modules that training explains, and the first lines of their documentation."""
    documents = {document.place: text(document) for document in pydocs()}
    lines = ((name, _first_line(documents.get(name, ""))) for name in _MODULES)
    return [(name, line) for name, line in lines if line]


@cache
def other_modules() -> list[str]:
    """Modules of the standard library that training does not explain."""
    explained = {name for name, _ in modules()}
    public = {name for name in sys.stdlib_module_names if not name.startswith("_")}
    return sorted(public - explained)


def _first_line(documentation: str) -> str:
    """The first line of a module's docstring if it is a sentence, with its full stop; else ""."""
    _, _, body = documentation.partition("=\n\n")  # below the title
    line, *more = body.partition("\n\n")[0].splitlines() or [""]
    if not re.fullmatch(rf"[A-Z].{{,{LINE - 2}}}", line) or (more and not line.endswith(".")):
        return ""
    return f"{line.rstrip('.')}."


def text(document: Document) -> str:
    return "".join(map(str, document.chunks))

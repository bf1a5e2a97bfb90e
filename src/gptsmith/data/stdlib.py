"""Built-in corpora: the documentation and the source code of Python's standard library.

Its files are parsed, not imported. The same installation always gives the same text.
"""

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from gptsmith.data.documents import Document
from gptsmith.data.paths import UnavailableError

# Not part of the library, or not meant to be read.
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS = Path("pydoc_data", "topics.py")


def pydocs() -> Iterator[Document]:
    """Docstrings, one document per module as help() would show it, and the language reference."""
    for place, text in _documentation():
        yield Document(place, (text,))


def pycode() -> Iterator[Document]:
    """The source files of the standard library, one document each."""
    for path, name in _modules():
        if name != _TOPICS:
            with tokenize.open(path) as file:  # reads the encoding line
                text = file.read()
            if text.strip():
                yield Document(str(name), (text,))


def _modules() -> list[tuple[Path, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    found = [(root / name, name) for name in names if not _EXCLUDED & set(name.parts)]
    if not found:
        raise UnavailableError(
            f"{root}: this Python has no source files of its standard library; "
            "use another corpus or another Python"
        )
    return found


@cache
def _documentation() -> list[tuple[str, str]]:
    """(module, text) pairs, parsed once, which takes seconds."""
    found = []
    for path, name in _modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own strings
            tree = ast.parse(path.read_bytes())
        module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        if name == _TOPICS:
            found += [(f"topic {title}", text.strip() + "\n") for title, text in _topics(tree)]
        elif text := "\n".join(_documentation_lines(tree, module)):
            found.append((module, f"{module}\n{'=' * len(module)}\n\n{text}"))
    return found


def _topics(tree: ast.Module) -> list[tuple[str, str]]:
    """(title, text) pairs of `help('if')` and the like: chapters of the language reference."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            return sorted(ast.literal_eval(node.value).items())
    return []


def _documentation_lines(node: ast.AST, name: str, indent: str = "") -> Iterator[str]:
    """Lines of documentation for a module, class or function, and for its public members."""
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    own = ast.get_docstring(node)
    if own:
        yield "\n".join(f"{indent}{line}".rstrip() for line in own.splitlines()) + "\n"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            bases = f"({', '.join(map(ast.unparse, child.bases))})" if child.bases else ""
            title = f"class {child.name}{bases}"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            title = f"{child.name}({ast.unparse(child.args)})"
        else:
            continue
        if child.name.startswith("_"):
            continue
        lines = list(_documentation_lines(child, child.name, indent + "    "))
        if lines:
            yield f"{indent}{title}"
            yield from lines

"""Execute a lesson without Jupyter, and keep what a notebook would show.

A lesson is a Python file in jupytext's percent format. Its cells run in one namespace, that of
`__main__`, and in a temporary folder. Each cell keeps, in this order, what it printed, the value of
its last expression (`_repr_html_` if it has one, else its repr; nothing for None or for parts of a
figure), and the figures that are open at its end.

    python -m docs.notebook docs/lessons/model.py       writes build/lessons/model.ipynb

Results are used again until the lesson, the package, this file, Python or a library changes.
"""

import ast
import base64
import contextlib
import fcntl
import hashlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

from gptsmith import files

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "docs" / "lessons"
EXECUTED = ROOT / "build" / "lessons"

_DPI = 150
_CSS_DPI = 96  # a figure of 4 inches is 384 pixels of CSS wide


def executed(lesson: Path, folder: Path = EXECUTED) -> NotebookNode:
    """The notebook of a lesson with its outputs, from `folder` if it is there and still true.

    Several processes may ask at once: one executes, the others wait. Raises what a cell raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, digest = folder / f"{lesson.stem}.ipynb", _digest(lesson)
    with (folder / f".{lesson.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            notebook = nbformat.read(path, as_version=4)
            if notebook.metadata.get("gptsmith", {}).get("digest") == digest:
                return notebook
        notebook = execute(lesson)
        notebook.metadata["gptsmith"] = {"digest": digest}
        files.write_text(path, nbformat.writes(notebook))
    return notebook


def execute(lesson: Path) -> NotebookNode:
    """The notebook of a lesson with the outputs of its cells. Raises what a cell raises or warns
    of; the traceback has the lines of the lesson."""
    text = lesson.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    module = ModuleType("__main__")
    module.__file__ = str(lesson)
    end = number = 0
    temporary = tempfile.TemporaryDirectory()
    with _main(module), _without_windows(), temporary as folder, contextlib.chdir(folder):
        for position, cell in enumerate(notebook.cells):
            cell.id = f"cell-{position}"
            if cell.cell_type != "code":
                continue
            number += 1
            start = text.index(cell.source, end)
            end = start + len(cell.source)
            above = text.count("\n", 0, start)
            cell.execution_count = number
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                cell.outputs = _run(cell, "\n" * above, str(lesson), vars(module))
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def _run(
    cell: NotebookNode, above: str, filename: str, namespace: dict[str, Any]
) -> list[NotebookNode]:
    """Execute a cell; its outputs. above: as many newlines as there are lines before the cell."""
    tree = ast.parse(above + cell.source, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, filename, "exec", dont_inherit=True), namespace)
        if isinstance(last, ast.Expr):
            code = compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)
            value = eval(code, namespace)
    outputs = []
    if printed.getvalue():
        outputs.append(new_output("stream", name="stdout", text=printed.getvalue()))
    if value is not None and not _is_drawing(value):
        data = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_()
        count = cell.execution_count
        outputs.append(new_output("execute_result", data=data, execution_count=count))
    return outputs + _figures(cell)


def _is_drawing(value: Any) -> bool:
    """Whether a value is what a method of matplotlib returned: an artist, or several."""
    values = value if isinstance(value, list | tuple) else [value]
    return any(type(part).__module__.partition(".")[0] == "matplotlib" for part in values)


def _figures(cell: NotebookNode) -> list[NotebookNode]:
    """The open figures, which are closed. Width and description go to the cell's metadata."""
    import matplotlib.pyplot as plt

    outputs, widths, titles = [], [], []
    for number in plt.get_fignums():
        figure, png = plt.figure(number), io.BytesIO()
        figure.savefig(
            png, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None}
        )
        data = png.getvalue()
        widths.append(int.from_bytes(data[16:20], "big") * _CSS_DPI // _DPI)  # from PNG's header
        titles += [axes.get_title() or axes.get_ylabel() for axes in figure.axes]
        outputs.append(
            new_output("display_data", data={"image/png": base64.b64encode(data).decode()})
        )
    plt.close("all")
    if outputs:
        described = "; ".join(dict.fromkeys(title for title in titles if title))
        image = {"alt": f"Figure: {described}" if described else "Figure"}
        if len(set(widths)) == 1:
            image["width"] = f"{widths[0]}px"
        cell.metadata["mystnb"] = {"image": image}
    return outputs


@contextlib.contextmanager
def _main(module: ModuleType) -> Iterator[None]:
    """`module` as __main__, which processes that a lesson starts look for."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


@contextlib.contextmanager
def _without_windows() -> Iterator[None]:
    """Figures are drawn to files; `plt.show()` leaves them to the end of the cell."""
    import matplotlib
    import matplotlib.pyplot as plt

    show = plt.show
    matplotlib.use("Agg")
    plt.close("all")
    plt.show = lambda *args, **kwargs: None
    try:
        with matplotlib.rc_context():
            yield
    finally:
        plt.show = show
        plt.close("all")


def _digest(lesson: Path) -> str:
    """sha256 of what the outputs follow from: lesson, package, this file, Python, which has texts
    that lessons learn from, and the libraries that they import."""
    digest = hashlib.sha256()
    package = ROOT / "src" / "gptsmith"
    sources = sorted(p for p in package.rglob("*") if p.suffix in (".py", ".c", ".h", ".json"))
    for path in (lesson, Path(__file__), *sources):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    digest.update(f"Python {sys.version}\n".encode())
    for library in ("torch", "numpy", "matplotlib", "tokenizers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{library} {version(library)}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        executed(Path(name).resolve())
        print(os.path.relpath(EXECUTED / f"{Path(name).stem}.ipynb"))

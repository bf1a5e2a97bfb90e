"""The runner of lessons keeps what a notebook shows."""

import base64
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext", reason="the extra docs is not installed")
from docs import notebook

HEADER = (notebook.LESSONS / "pretraining_components.py").read_text().partition("\n\n")[0] + "\n"


def lesson(folder: Path, *cells: str) -> Path:
    path = folder / "lesson.py"
    path.write_text(
        HEADER + "".join(f"\n# %%\n{textwrap.dedent(cell).strip()}\n" for cell in cells)
    )
    return path


def outputs(path: Path) -> list[list[Any]]:
    return [c.outputs for c in notebook.execute(path).cells if c.cell_type == "code"]


def test_a_cell_keeps_what_it_prints_and_the_value_of_its_last_expression(tmp_path: Path) -> None:
    first, second, third = outputs(
        lesson(tmp_path, "print('printed')\nx = 41\nx + 1", "x = 3", "print(x) or None")
    )
    assert [o.output_type for o in first] == ["stream", "execute_result"]
    assert (first[0].text, first[1].data["text/plain"]) == ("printed\n", "42")
    assert second == []
    assert [o.text for o in third] == ["3\n"]


def test_html_is_preferred_to_the_repr(tmp_path: Path) -> None:
    page = """
        class Page:
            def _repr_html_(self):
                return "<b>bold</b>"
        Page()
    """
    [[value]] = outputs(lesson(tmp_path, page))
    assert value.data["text/html"] == "<b>bold</b>"


def test_every_open_figure_is_kept_once(tmp_path: Path) -> None:
    draw = """
        import matplotlib.pyplot as plt
        for _ in range(2):
            figure, axes = plt.subplots(figsize=(2, 1))
            axes.plot([1, 2])
            plt.show()
        axes.set(title="a line")
    """
    path = lesson(tmp_path, draw, "1")
    first, second = outputs(path)
    assert [o.output_type for o in first] == ["display_data"] * 2  # what axes.set returned is not
    assert all(base64.b64decode(o.data["image/png"]).startswith(b"\x89PNG") for o in first)
    assert len(second) == 1
    [cell, _] = [c for c in notebook.execute(path).cells if c.cell_type == "code"]
    assert cell.metadata["mystnb"]["image"]["alt"] == "Figure: a line"


def test_an_error_has_the_line_of_the_lesson(tmp_path: Path) -> None:
    path = lesson(tmp_path, "x = 1", "y = 2\nassert x == y, 'unequal'")
    number = 1 + path.read_text().splitlines().index("assert x == y, 'unequal'")
    with pytest.raises(AssertionError, match="unequal") as caught:
        notebook.execute(path)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(path), number)


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    path = lesson(tmp_path, "import warnings\nwarnings.warn('obsolete', DeprecationWarning)")
    with pytest.raises(DeprecationWarning, match="obsolete"):
        notebook.execute(path)


def test_a_lesson_runs_as_main_in_a_folder_of_its_own(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        class Part: ...
        Path("file").write_text("left behind")
        print(Path.cwd(), __name__, sys.modules[Part.__module__].Part is Part)
    """
    import sys

    main = sys.modules["__main__"]
    [[printed]] = outputs(lesson(tmp_path, code))
    folder, name, found = printed.text.split()
    assert (name, found) == ("__main__", "True")
    assert not Path(folder).exists()
    assert sys.modules["__main__"] is main


def test_a_lesson_is_executed_again_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    code = f"with open({str(count)!r}, 'a') as file:\n    file.write('x')"
    path = lesson(tmp_path, code)
    made = [notebook.executed(path, tmp_path / "kept") for _ in range(2)]
    assert made[0] == made[1]
    assert count.read_text() == "x"
    notebook.executed(lesson(tmp_path, code, "1 + 1"), tmp_path / "kept")
    assert count.read_text() == "xx"
    monkeypatch.setattr(notebook.sys, "version", "4.0")
    notebook.executed(path, tmp_path / "kept")
    assert count.read_text() == "xxx"
    broken = lesson(tmp_path, code, "1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            notebook.executed(broken, tmp_path / "kept")
    assert count.read_text() == "xxxxx"

"""The lessons run from top to bottom, without Jupyter; what they claim, they assert."""

import re
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="the extra docs is not installed")
from docs import notebook

LESSONS = sorted(notebook.LESSONS.glob("*.py"))


@pytest.mark.parametrize("lesson", LESSONS, ids=[path.stem for path in LESSONS])
def test_a_lesson_runs(lesson: Path, one_thread: None) -> None:
    """Its outputs stay in build/lessons, where the site takes them from."""
    found = notebook.executed(lesson)
    outputs = [o for cell in found.cells if cell.cell_type == "code" for o in cell.outputs]
    kinds = {kind for o in outputs for kind in o.get("data", {"text/plain": ""})}
    assert {"text/plain", "image/png"} <= kinds


@pytest.mark.parametrize("lesson", LESSONS, ids=[path.stem for path in LESSONS])
def test_a_lesson_is_cells_of_text_and_code(lesson: Path) -> None:
    text = lesson.read_text(encoding="utf-8")
    cells = re.findall(r"^# %%(.*)$", text, re.MULTILINE)
    assert cells.count(" [markdown]") >= 5
    assert cells.count("") >= 5
    assert "format_name: percent" in text

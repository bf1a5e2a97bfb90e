"""The lessons run from top to bottom, without Jupyter; what they claim, they assert."""

import re
import runpy
from pathlib import Path

import pytest

LESSONS = sorted((Path(__file__).resolve().parents[1] / "docs/lessons").glob("*.py"))


@pytest.mark.parametrize("lesson", LESSONS, ids=[path.stem for path in LESSONS])
def test_a_lesson_runs(
    lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(lesson))
    assert plt.get_fignums()  # its pictures
    plt.close("all")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lesson", LESSONS, ids=[path.stem for path in LESSONS])
def test_a_lesson_is_cells_of_text_and_code(lesson: Path) -> None:
    text = lesson.read_text(encoding="utf-8")
    cells = re.findall(r"^# %%(.*)$", text, re.MULTILINE)
    assert cells.count(" [markdown]") >= 5
    assert cells.count("") >= 5
    assert "format_name: percent" in text

"""Names of any script in figures: no warning, no formula, no box."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from gptsmith.evaluate.charts import draw, draw_confusion, draw_history
from gptsmith.evaluate.classification import Scores
from gptsmith.evaluate.result import Result
from gptsmith.model import masks
from gptsmith.train import figure_text as figures
from gptsmith.train.figure_text import figure_text
from gptsmith.train.plots import draw_curves

NAMES = [
    "模型-训练",
    "run\x1b]0;x\x07",
    "a$b$ \\frac$",
    "_private",
    "שלום हिन्दी 🙂",
    "a\nb\tc",
    "\udcff%",
]


@pytest.fixture
def only_its_own_font(monkeypatch: pytest.MonkeyPatch):
    """As on a machine without further fonts."""
    figures._fonts.cache_clear()
    monkeypatch.setattr(figures, "_OTHERS", ())
    yield
    figures._fonts.cache_clear()


@pytest.mark.usefixtures("only_its_own_font")
def test_what_no_font_has_is_spelt_out() -> None:
    assert figure_text("naïve Ωμέγα жук") == "naïve Ωμέγα жук"
    assert figure_text("模-a") == r"\u6a21-a"
    assert figure_text("🙂\x1b\n\udcff") == r"\U0001f642\x1b\n\udcff"
    assert figure_text("$5 and $6") == r"\$5 and \$6"
    assert figure_text("_x") == " _x"


def test_an_installed_font_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_OTHERS", ("STIXGeneral",))  # matplotlib brings it
    figures._fonts.cache_clear()
    try:
        assert list(figures._fonts()) == ["DejaVu Sans", "STIXGeneral"]
        assert figure_text("\u27c3") in ("\u27c3", r"\u27c3")
    finally:
        figures._fonts.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_figures_draw_any_name_without_a_warning(name: str, tmp_path: Path) -> None:
    rows = [
        {"step": i, "train_loss": 2.0, "val_loss": 2.0, "learning_rate": 1.0, f"acc{name}": 0.5}
        for i in range(3)
    ]
    events = [{"event": "val", "step": 1, "val_loss": 1.0, "accuracy": 0.5}]
    results = {n: [Result(name, 10, {name: 0.5}, {})] for n in (name, "other")}
    counts = np.array([[3, 1], [0, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(tmp_path / "c.png", rows, name, {f"acc{name}": {name: 0.3}})
        draw(tmp_path / "chart", results)
        draw_confusion(tmp_path / "confusion", Scores((name, "other"), counts, 0.1), name)
        draw_history(tmp_path / "history", events, name)
        masks.Mask(lambda b, h, q, k: q >= k, name).png(tmp_path / "m.png")
    assert len(list(tmp_path.glob("*.png"))) == 5

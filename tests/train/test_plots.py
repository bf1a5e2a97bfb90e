"""plots.py; test_monitor.py looks at the picture of a whole run."""

from pathlib import Path

import pytest

from gptsmith.train.plots import draw_curves


@pytest.mark.parametrize(
    ("val", "label"),
    [
        ([3.0], "val 3.000"),
        ([4.2, 3.9], "val 3.900"),
        ([7.6, 5.0, 3.7], "val 3.700"),
        ([4.0, 3.0, 3.5, 3.9], "val 3.000, best at step 10"),
        ([None, 4.0, float("nan")], "val 4.000"),  # the table holds None for NaN; both are nothing
        ([float("inf"), None], None),
    ],
)
def test_legend_does_not_hide_points(
    val: list[float | None], label: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    rows = [
        {"step": 10 * i, "val_loss": v, "train_loss": v and v + 0.2 if i else None, "tokens": i}
        for i, v in enumerate(val)
    ]
    draw_curves(tmp_path / "curves.png", rows, "run")
    losses = drawn[0].axes[0]
    words = [*losses.texts, *filter(None, [losses.get_legend()])]
    names = [text.get_text() for legend in words for text in legend.get_texts()]
    assert [name for name in names if name.startswith("val")] == ([label] if label else [])
    renderer = RendererAgg(1200, 810, 150)
    for line in losses.lines:
        for point in losses.transData.transform(line.get_xydata()):
            for word in words:
                assert not word.get_window_extent(renderer).padded(4).contains(*point)


def test_measurements_have_panels_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    rows = [
        {
            "step": i,
            "train_loss": 2.0,
            "train_reward": i / 9,
            "val_reward": i / 8 if i % 3 else None,
        }
        for i in range(9)
    ]
    curves = ("reward", "absent")
    draw_curves(tmp_path / "curves.png", rows, "run", curves=curves, loss_label="loss (per pair)")
    losses, reward, rate = drawn[0].axes
    assert [axes.get_ylabel() for axes in (losses, reward, rate)] == [
        "loss (per pair)",
        "reward",
        "learning rate",
    ]
    train, val = reward.lines
    assert list(train.get_ydata()) == [i / 9 for i in range(9)]
    assert list(val.get_xdata()) == [1, 2, 4, 5, 7, 8]

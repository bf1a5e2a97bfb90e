"""Charts of a classifier, as PNG and PDF: its confusion matrix and its learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.evaluate.classification import Scores
from gptsmith.evaluate.report import save_figure
from gptsmith.train.figure_text import figure_text, with_fonts
from gptsmith.train.plots import GRID, INK, TRAIN, VAL

MAX_COUNTS_SHOWN = 20  # classes; a confusion matrix of more shows no counts


@with_fonts
def draw_confusion(path: Path, scores: Scores, title: str) -> None:
    """The confusion matrix as path.png and path.pdf: counts, coloured by their share of the row."""
    figure = _figure(max(4.6, min(11.0, 3 + 0.55 * len(scores.labels))), 0.82)
    axes = figure.subplots()
    share = scores.counts / np.maximum(1, scores.support)[:, None]
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [figure_text(label, 16) for label in scores.labels]
    L = len(names)
    step = -(-L // 40)  # with more classes, some names are left out
    rotation = 90 if L > MAX_COUNTS_SHOWN else 45 if max(map(len, names)) * L > 40 else 0
    alignment = {} if rotation in (0, 90) else dict(ha="right", rotation_mode="anchor")
    axes.set_xticks(range(0, L, step), names[::step], rotation=rotation, **alignment)
    axes.set_yticks(range(0, L, step), names[::step])
    if L <= MAX_COUNTS_SHOWN:
        for i, row in enumerate(scores.counts):
            for j, count in enumerate(row):
                colour = "white" if share[i, j] > 0.55 else INK
                axes.text(
                    j, i, f"{count:,}", ha="center", va="center", color=colour,
                    fontsize=11 if L <= 4 else 9 if L <= 10 else 7,
                )  # fmt: skip
    axes.set_xlabel("predicted", color=INK, fontsize=9)
    axes.set_ylabel("true", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9 if L <= MAX_COUNTS_SHOWN else 6, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        figure_text(title, 80), loc="left", color=INK, fontsize=11, fontweight="bold", pad=22
    )
    what = f"accuracy {scores.accuracy:.1%}, macro-F1 {scores.macro_f1:.3f}"
    axes.annotate(
        what, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
        color=INK, fontsize=9,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=22, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)
    bar.set_ticks([0, 0.5, 1], labels=["0%", "50%", "100% of a row"])
    save_figure(figure, path)


@with_fonts
def draw_history(path: Path, events: Sequence[Mapping[str, Any]], title: str) -> None:
    """Loss and accuracy over steps as path.png and path.pdf, on training and validation texts.

    events: those of metrics.jsonl; "val" events with a `val_loss` are plotted.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    events = [e for e in events if e["event"] == "val" and e.get("val_loss") is not None]
    steps = [e["step"] for e in events]
    figure = _figure(8, 0.68)
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    panels = (
        (losses, "sample_loss", "val_loss", "loss (nats per text)", min, "{:.3f}"),
        (accuracies, "sample_accuracy", "accuracy", "accuracy", max, "{:.1%}"),
    )
    for axes, seen, unseen, name, best, form in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=INK, labelsize=9, width=0.6)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_ylabel(name, color=INK, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        for key, colour, label in ((seen, TRAIN, "training texts"), (unseen, VAL, "validation")):
            values = [e.get(key) for e in events]
            points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=label,
                          marker="o", markersize=3.5)  # fmt: skip
        found = [float(e[unseen]) for e in events if e.get(unseen) is not None]
        if found:
            text = f"best validation {form.format(best(found))}"
            axes.set_title(text, loc="right", color=VAL, fontsize=9)
    losses.set_title(figure_text(title, 80), loc="left", color=INK, fontsize=11, fontweight="bold")
    if events:
        losses.legend(frameon=False, fontsize=9, labelcolor=INK)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    accuracies.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    accuracies.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    accuracies.set_xlabel("step", color=INK, fontsize=9)
    save_figure(figure, path)


def _figure(width: float, shape: float) -> Any:
    """A figure of `width` inches, without pyplot (see train/plots.py)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, shape * width), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure

"""Charts, as PNG and PDF: metrics of runs, a classifier's confusion matrix and learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.evaluate.classification import Scores
from gptsmith.evaluate.report import SHARE, UNITS, find, format_value, references_of, rows_of
from gptsmith.evaluate.result import Result
from gptsmith.files import write_figure
from gptsmith.train.figure_text import figure_text, with_fonts
from gptsmith.train.plots import COLOURS, GRID, INK, TICK_STEPS, TRAIN, VAL

MAX_COUNTS_SHOWN = 20  # classes; a confusion matrix of more shows no counts


@with_fonts
def draw(stem: Path, runs: Mapping[str, Sequence[Result]]) -> None:
    """A bar chart with standard errors as STEM.png and STEM.pdf.

    One colour per run, one axis per unit, lines at chance and GPT-2 124M as far as they are known.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(runs)
    heights = [
        _positions(rows)[-1] * (0.2 + 0.24 * len(runs)) + 0.5 + 0.24 * len(runs)
        for rows in panels.values()
    ]
    layout = ConstrainedLayoutEngine(h_pad=0.08, hspace=0.03)
    figure = _figure(8, sum(heights) + 0.7, layout)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    handles: dict[str, Any] = {}
    tasks = {task for rows in panels.values() for task, _ in rows}
    for axes, (unit, rows) in zip(all_axes, panels.items(), strict=True):
        handles |= _panel(axes, unit, rows, runs)
        axes.set_yticks(_positions(rows), _labels(rows, name_tasks=len(tasks) > 1))
    if len(tasks) == 1:
        title = figure_text(tasks.pop())
        all_axes[0].set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    order = [*(name for name in runs if name in handles), *(h for h in handles if h not in runs)]
    figure.legend(
        [handles[name] for name in order], [*map(figure_text, order)],
        loc="outside upper left", frameon=False, ncols=min(4, len(order)), fontsize=9,
        labelcolor=INK, handlelength=1.2,
    )  # fmt: skip
    _save(figure, stem)


def _panel(
    axes: Any,
    unit: str,
    rows: Sequence[tuple[str, str]],
    runs: Mapping[str, Sequence[Result]],
) -> dict[str, Any]:
    """Horizontal bars, which leave room for long names. Returns the handles of the legend."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    positions, height, right = _positions(rows), 0.8 / len(runs), 0.0
    handles: dict[str, Any] = {}
    edge = [withStroke(linewidth=3, foreground="white")]  # legible on any colour
    for r, (name, results) in enumerate(runs.items()):
        for y, (task, metric) in zip(positions, rows, strict=True):
            result = find(results, task, metric)
            if result is None:
                continue
            value, error = result.metrics[metric], result.stderr.get(metric, math.nan)
            width = value if math.isfinite(value) else 0.0
            spread = error if math.isfinite(error) else 0.0
            at = y + (r - (len(runs) - 1) / 2) * height
            handles.setdefault(name, axes.barh(at, width, 0.88 * height, color=COLOURS[r]))
            if spread:
                axes.errorbar(
                    width, at, xerr=spread, color=INK, elinewidth=1, capsize=2.5, capthick=1
                )
            axes.annotate(
                format_value(metric, value), (width + spread, at), (5, 0),
                textcoords="offset points", va="center", color=INK, fontsize=8, path_effects=edge,
                zorder=4,
            )  # fmt: skip
            right = max(right, width + spread)
    lines = {
        "chance": ("#777777", (0, (2, 1.2))),
        "majority class": ("#777777", (0, (2, 1.2))),
        "GPT-2 124M": (INK, "solid"),
    }
    for y, (task, metric) in zip(positions, rows, strict=True):
        for name, x in references_of(runs, task, metric).items():
            colour, style = lines[name]
            handles[name] = axes.plot(
                (x, x), (y - 0.48, y + 0.48), color=colour, linestyle=style, linewidth=1.4,
                path_effects=edge, zorder=3,
            )[0]  # fmt: skip
            right = max(right, x)
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1.13 * right or 1)
    axes.set_xlabel(unit, color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
    if unit == SHARE[0]:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    axes.tick_params(colors=INK, labelsize=9, width=0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    return handles


def _labels(rows: Sequence[tuple[str, str]], name_tasks: bool) -> list[str]:
    """The names of the rows: metrics, after the name of their task at its first one."""
    return [
        figure_text(f"{task}: {metric}" if name_tasks and above != task else metric)
        for (above, _), (task, metric) in pairwise([("", ""), *rows])
    ]


def _panels(runs: Mapping[str, Sequence[Result]]) -> dict[str, list[tuple[str, str]]]:
    """Rows by unit: each unit has its own axis."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for task, metric in rows_of(runs):
        panels.setdefault(UNITS.get(metric, SHARE)[0], []).append((task, metric))
    return panels


def _positions(rows: Sequence[tuple[str, str]]) -> list[float]:
    """Vertical positions of the rows, from 0 down: 1 apart, and 1.3 between tasks."""
    positions = [0.0]
    for (above, _), (task, _) in pairwise(rows):
        positions.append(positions[-1] + (1 if task == above else 1.3))
    return positions


@with_fonts
def draw_confusion(path: Path, scores: Scores, title: str) -> None:
    """The confusion matrix as path.png and path.pdf: counts, coloured by their share of the row."""
    width = max(4.6, min(11.0, 3 + 0.55 * len(scores.labels)))
    figure = _figure(width, 0.82 * width)
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
    _save(figure, path)


@with_fonts
def draw_history(path: Path, events: Sequence[Mapping[str, Any]], title: str) -> None:
    """Loss and accuracy over steps as path.png and path.pdf, on training and validation texts.

    events: those of metrics.jsonl; "val" events with a `val_loss` are plotted.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    events = [e for e in events if e["event"] == "val" and e.get("val_loss") is not None]
    steps = [e["step"] for e in events]
    figure = _figure(8, 0.68 * 8)
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
    _save(figure, path)


def _figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """A figure in inches, without pyplot (see train/plots.py)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout=layout)


def _save(figure: Any, stem: Path) -> None:
    """Save a matplotlib figure as STEM.png and STEM.pdf; equal figures are equal files."""
    for suffix in (".png", ".pdf"):
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        write_figure(stem.with_name(stem.name + suffix), figure, metadata=metadata)

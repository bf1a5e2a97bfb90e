"""curves.png: losses over steps (and tokens), task scores and other measurements if there are any,
learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.files import write_figure
from gptsmith.train.figure_text import figure_text, with_fonts

INK, GRID, TRAIN, VAL, RATE = "#333333", "#e4e4e4", "#2f6db3", "#d9541e", "#3a8a5f"
# Okabe and Ito 2008: distinguishable under every common kind of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TICK_STEPS = [1, 2, 2.5, 5, 10]  # distances of the ticks, times a power of ten


@with_fonts
def draw_curves(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    curves: Sequence[str] = (),
    loss_label: str = "loss (nats per token)",
    objective: str = "loss",
) -> None:
    """Draw rows of metrics.csv (dicts; values may be absent or None) as a PNG.

    scores: columns with accuracies to draw, each with reference values by name. curves: further
    measurements, in the columns train_NAME and val_NAME, with a panel each. objective: what the
    large panel shows, the loss, or a measurement of which more is better.
    Takes about 0.3 s, and on the first call the same again to import matplotlib. pyplot is not
    used: its figures are global state, and it looks for a window system.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = {name: refs for name, refs in (scores or {}).items() if len(_series(rows, name)[0])}
    measured = [name for name in curves if any(len(x) for x, _ in _train_and_val(rows, name))]
    heights = (3, *((2,) if shown else ()), *(1.5 for _ in measured), 1)
    figure = Figure(figsize=(8, 1.35 * sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    losses, rates = panels[0], panels[-1]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=INK, labelsize=9, width=0.6)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)

    if objective == "loss":
        _draw_losses(losses, rows, loss_label)
    else:
        _draw_measurement(losses, rows, objective, show_best=True)
    losses.set_title(
        figure_text(title, 80), loc="left", color=INK, fontsize=11, fontweight="bold", pad=10
    )

    if shown:
        _draw_scores(panels[1], rows, shown)
    for axes, name in zip(panels[-1 - len(measured) : -1], measured, strict=True):
        _draw_measurement(axes, rows, name)

    steps, rate = _series(rows, "learning_rate")
    rates.plot(steps, rate, color=RATE, linewidth=1.5)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate", color=INK, fontsize=9)
    rates.yaxis.set_major_locator(MaxNLocator(3))
    rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    rates.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=TICK_STEPS))
    rates.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    rates.set_xlabel("step", color=INK, fontsize=9)
    end = max((row["step"] for row in rows), default=0) or 1
    rates.set_xlim(-0.012 * end, 1.02 * end)

    steps, tokens = _series(rows, "tokens")
    if len(steps) > 1 and tokens[-1] > tokens[0] and (np.diff(tokens) > 0).all():
        # Tokens over steps are nearly a straight line; it is extrapolated beyond its ends.
        both_ways = (lambda x: _line(x, steps, tokens), lambda x: _line(x, tokens, steps))
        top = losses.secondary_xaxis("top", functions=both_ways)
        top.spines["top"].set_visible(False)
        top.tick_params(colors="#777777", labelsize=8, length=0, pad=1)
        top.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
        top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))

    write_figure(path, figure)


def _draw_losses(axes: Any, rows: Sequence[Mapping[str, Any]], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    (steps, train), (at, val) = _train_and_val(rows, "loss")
    _draw_train(axes, steps, train)
    if len(at):
        # In the legend, which is placed automatically: a label at the point would hide others.
        best = int(np.argmin(val))
        suffix = "" if best == len(val) - 1 else f", best at step {at[best]:,.0f}"
        text = f"val {val[best]:.3f}{suffix}"
        axes.plot(at, val, color=VAL, linewidth=1.8, marker="o", markersize=3.5, label=text)
    if len(steps) or len(at):
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        axes.set_ylim(*_limits(np.concatenate([train, val])))
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(7))


def _draw_measurement(
    axes: Any, rows: Sequence[Mapping[str, Any]], name: str, show_best: bool = False
) -> None:
    from matplotlib.ticker import MaxNLocator

    (steps, train), (at, val) = _train_and_val(rows, name)
    _draw_train(axes, steps, train)
    if len(at):
        text = f"val {val[-1]:.3g}"
        if show_best and (best := int(np.argmax(val))) < len(val) - 1:
            text = f"val {val[best]:.3g}, best at step {at[best]:,.0f}"
        axes.plot(at, val, color=VAL, linewidth=1.8, marker="o", markersize=3.5, label=text)
    if axes.get_legend_handles_labels()[0]:  # none before the first evaluation
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.margins(y=0.15)
    axes.set_ylabel(figure_text(name.replace("_", " ")), color=INK, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _draw_train(axes: Any, steps: np.ndarray, train: np.ndarray) -> None:
    if len(steps) >= 40:  # single batches are noisy: draw them faintly, and their trend
        axes.plot(steps, train, color=TRAIN, alpha=0.28, linewidth=0.8)
        trend = _smooth(train)
        axes.plot(steps, trend, color=TRAIN, linewidth=1.8, label="train (smoothed)")
    elif len(steps):
        axes.plot(steps, train, color=TRAIN, linewidth=1.8, marker=".", label="train")


def _draw_scores(
    axes: Any, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, float]]
) -> None:
    from matplotlib.ticker import PercentFormatter

    for i, (name, references) in enumerate(scores.items()):
        steps, values = _series(rows, name)
        colour = COLOURS[i % len(COLOURS)]
        label = figure_text(f"{name.replace('_', ' ')} {values[-1]:.1%}")
        axes.plot(
            steps, values, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label
        )
        for reference, height in references.items():
            axes.axhline(height, color=colour, linewidth=1, linestyle=(0, (4, 2)))
            axes.annotate(
                figure_text(reference), (1, height), (-2, 2), ha="right",
                xycoords=("axes fraction", "data"),
                textcoords="offset points", color=colour, fontsize=8,
            )  # fmt: skip
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.margins(y=0.15)
    axes.set_ylabel("accuracy", color=INK, fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _train_and_val(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Steps and values of a measurement in training and in validation."""
    return [_series(rows, f"{kind}_{name}") for kind in ("train", "val")]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a finite `name`."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a centred window of a fortieth of the points.

    The window shrinks at the start, and is one-sided at the end.
    """
    half = max(1, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    start, stop = index - reach, np.minimum(index + reach + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of the loss axis: the whole range, unless a steep start would flatten the rest.

    Then the upper part is cut off, at most half of the range, down to five times the spread of the
    last two thirds.
    """
    low, high = float(values.min()), float(values.max())
    late = values[len(values) // 3 :]
    spread = float(np.quantile(late, 0.98)) - low
    high = min(high, low + max(5 * spread, 0.5 * (high - low)))
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _line(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Linear interpolation, extrapolated with the mean slope."""
    x = np.asarray(x, dtype=np.float64)
    slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])
    inside = np.interp(x, xs, ys)
    return inside + slope * (np.minimum(x - xs[0], 0) + np.maximum(x - xs[-1], 0))


def _compact(tokens: float) -> str:
    """12,345,678 as 12.3M; 0 as "0 tokens", because the axis has no other label."""
    if tokens <= 0:
        return "0 tokens" if tokens == 0 else ""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.0f}"

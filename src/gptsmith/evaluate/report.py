"""Results of evaluation tasks, and their presentation: as JSON, as a table, as a bar chart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from gptsmith.console import Text
from gptsmith.files import write_figure
from gptsmith.train.figure_text import figure_text, with_fonts
from gptsmith.train.plots import COLOURS, GRID, INK, TICK_STEPS

# Axis and number format of metrics that are not shares. Shares (0 to 1) have one axis in common.
_UNITS = {
    "val_loss": ("loss (nats per token, lower is better)", ",.4f"),
    "loss": ("loss (nats per text, lower is better)", ",.4f"),
    "perplexity": ("perplexity (lower is better)", ",.2f"),
    "bits_per_byte": ("bits per byte (lower is better)", ",.4f"),
    "bleu": ("BLEU (0 to 100)", ",.2f"),
    "score": ("the judge's score (0 to 100)", ",.1f"),
}
_SHARE = ("share of the items", ".1%")


@dataclass(frozen=True)
class Result:
    """Metrics of one task over n items, and the items themselves."""

    task: str
    n: int
    metrics: Mapping[str, float]
    """Shares are in 0..1. NaN and infinity are allowed; in JSON they are null."""
    stderr: Mapping[str, float]
    """Standard errors, by metric, of those that have one."""
    items: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """More for the JSON: settings, intervals, counts."""
    notes: Sequence[str] = ()
    """What the reader must know to interpret the metrics, one line each."""
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores to compare with, by metric and name: chance, GPT-2 124M."""
    key: tuple[str, ...] = ("id",)
    """Fields of an item that tell which item of another run is the same."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """What the metrics depend on besides the model: two runs should have the same."""

    def fields(self) -> dict[str, Any]:
        """For JSON, without the items: n, each metric and its NAME_stderr, details, notes."""
        fields: dict[str, Any] = {"n": self.n}
        for name, value in self.metrics.items():
            fields[name] = value if math.isfinite(value) else None
            if math.isfinite(error := self.stderr.get(name, math.nan)):
                fields[f"{name}_stderr"] = error
        notes = {"notes": list(self.notes)} if self.notes else {}
        return fields | dict(self.conditions) | dict(self.details) | notes


def prompt_form(template: str | None) -> str:
    """How questions are put, to tell whether two runs were asked alike."""
    if template is None:
        return "plain text"
    return f"chat template {hashlib.sha256(template.encode()).hexdigest()[:8]}"


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error: sample standard deviation / sqrt(n), NaN for a single value.

    ValueError for none.
    """
    n = len(values)
    if not n:
        raise ValueError("nothing to score: no items")
    centre = math.fsum(values) / n
    if n == 1:
        return centre, math.nan
    variance = math.fsum((x - centre) ** 2 for x in values) / (n - 1)
    return centre, math.sqrt(variance / n)


def chance(choices: Sequence[int]) -> float:
    """Accuracy of guessing questions with these numbers of choices."""
    return mean([1 / n for n in choices])[0]


def show(metric: str, value: float, error: float = math.nan) -> str:
    """A value as text, with its standard error if there is one: `29.4% ± 0.5`."""
    form = _UNITS.get(metric, _SHARE)[1]
    if abs(value) >= 1e7:  # the perplexity of an untrained model
        form = ".3g"
    text = format(value, form)
    return f"{text} ± {format(error, form).rstrip('%')}" if math.isfinite(error) else text


def show_difference(metric: str, value: float, interval: tuple[float, float] | None) -> str:
    """A difference and its interval as text; of shares in percentage points: `+2.5 [-1.0, +6.0]
    pp`."""
    form = _UNITS.get(metric, _SHARE)[1]
    scale, form, unit = (100, ".1f", " pp") if form == _SHARE[1] else (1, form, "")
    text = format(scale * value, f"+{form}")
    if interval is not None:
        low, high = (format(scale * bound, f"+{form}") for bound in interval)
        text += f" [{low}, {high}]"
    return text + unit


def table(results: Sequence[Result]) -> Group:
    """One row per metric; for several runs see `comparison`."""
    return comparison({"value ± standard error": results})


def comparison(
    runs: Mapping[str, Sequence[Result]],
    differences: Mapping[tuple[str, str], str] | None = None,
) -> Group:
    """A table per task: one row per metric, one column per run, and known scores to compare with.

    differences: of the runs, by task and metric, for a column of their own.
    """
    rows, tables = _rows(runs), list[Text | Table]()
    for task in dict.fromkeys(task for task, _ in rows):
        references = {
            metric: _references(runs, task, metric) for name, metric in rows if name == task
        }
        counts = [f"{r.n:,}" for results in runs.values() for r in results if r.task == task]
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        shown.add_column("metric", no_wrap=True)
        for name in (*runs, *(["difference [95%]"] if differences is not None else [])):
            # a narrow terminal must not cut figures
            shown.add_column(name, justify="right", overflow="fold", min_width=10)
        has_references = any(references.values())
        if has_references:
            shown.add_column("reference", no_wrap=True)
        for metric, known in references.items():
            found = [_find(results, task, metric) for results in runs.values()]
            cells = [
                show(metric, r.metrics[metric], r.stderr.get(metric, math.nan)) if r else ""
                for r in found
            ]
            if differences is not None:
                cells.append(differences.get((task, metric), ""))
            if has_references:
                cells.append("\n".join(f"{name} {show(metric, x)}" for name, x in known.items()))
            shown.add_row(metric, *cells)
        tables += [Text(f"{task}, {' / '.join(dict.fromkeys(counts))} items"), shown]
    return Group(*tables)


@with_fonts
def draw(stem: Path, runs: Mapping[str, Sequence[Result]]) -> None:
    """A bar chart with standard errors as STEM.png and STEM.pdf.

    One colour per run, one axis per unit, lines at chance and GPT-2 124M as far as they are known.
    ValueError without a metric, and for more runs than there are colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} runs in one chart: at most {len(COLOURS)} have a colour")
    panels = _panels(runs)
    if not panels:
        raise ValueError("no results: nothing to draw")
    heights = [
        _positions(rows)[-1] * (0.2 + 0.24 * len(runs)) + 0.5 + 0.24 * len(runs)
        for rows in panels.values()
    ]
    layout = ConstrainedLayoutEngine(h_pad=0.08, hspace=0.03)
    figure = Figure(figsize=(8, sum(heights) + 0.7), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    handles: dict[str, Any] = {}
    for axes, (unit, rows) in zip(all_axes, panels.items(), strict=True):
        handles |= _panel(axes, unit, rows, runs)
    order = [*(name for name in runs if name in handles), *(h for h in handles if h not in runs)]
    figure.legend(
        [handles[name] for name in order], [*map(figure_text, order)],
        loc="outside upper left", frameon=False, ncols=min(4, len(order)), fontsize=9,
        labelcolor=INK, handlelength=1.2,
    )  # fmt: skip
    save_figure(figure, stem)


def save_figure(figure: Any, stem: Path) -> None:
    """Save a matplotlib figure as STEM.png and STEM.pdf; equal figures are equal files."""
    for suffix in (".png", ".pdf"):
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        write_figure(stem.with_name(stem.name + suffix), figure, metadata=metadata)


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
            result = _find(results, task, metric)
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
                show(metric, value), (width + spread, at), (5, 0), textcoords="offset points",
                va="center", color=INK, fontsize=8, path_effects=edge, zorder=4,
            )  # fmt: skip
            right = max(right, width + spread)
    lines = {
        "chance": ("#777777", (0, (2, 1.2))),
        "majority class": ("#777777", (0, (2, 1.2))),
        "GPT-2 124M": (INK, "solid"),
    }
    for y, (task, metric) in zip(positions, rows, strict=True):
        for name, x in _references(runs, task, metric).items():
            colour, style = lines[name]
            handles[name] = axes.plot(
                (x, x), (y - 0.48, y + 0.48), color=colour, linestyle=style, linewidth=1.4,
                path_effects=edge, zorder=3,
            )[0]  # fmt: skip
            right = max(right, x)
    starts = [i == 0 or rows[i - 1][0] != task for i, (task, _) in enumerate(rows)]
    names = [
        f"{row[0]}  {row[1]}" if new else row[1] for row, new in zip(rows, starts, strict=True)
    ]
    axes.set_yticks(positions, [*map(figure_text, names)])
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1.13 * right or 1)
    axes.set_xlabel(unit, color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
    if unit == _SHARE[0]:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    axes.tick_params(colors=INK, labelsize=9, width=0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    return handles


def _panels(runs: Mapping[str, Sequence[Result]]) -> dict[str, list[tuple[str, str]]]:
    """Rows by unit: each unit has its own axis."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for task, metric in _rows(runs):
        panels.setdefault(_UNITS.get(metric, _SHARE)[0], []).append((task, metric))
    return panels


def _positions(rows: Sequence[tuple[str, str]]) -> list[float]:
    """Vertical positions of the rows, from 0 down: 1 apart, and 1.3 between tasks."""
    positions = [0.0]
    for (above, _), (task, _) in pairwise(rows):
        positions.append(positions[-1] + (1 if task == above else 1.3))
    return positions


def _rows(runs: Mapping[str, Sequence[Result]]) -> list[tuple[str, str]]:
    """(task, metric) of all runs, without duplicates, grouped by task."""
    tasks: dict[str, dict[str, None]] = {}
    for results in runs.values():
        for result in results:
            tasks.setdefault(result.task, {}).update(dict.fromkeys(result.metrics))
    return [(task, metric) for task, metrics in tasks.items() for metric in metrics]


def _find(results: Sequence[Result], task: str, metric: str) -> Result | None:
    return next((r for r in results if r.task == task and metric in r.metrics), None)


def _references(
    runs: Mapping[str, Sequence[Result]], task: str, metric: str
) -> Mapping[str, float]:
    found = (_find(results, task, metric) for results in runs.values())
    return next((r.references[metric] for r in found if r and metric in r.references), {})

"""Results of evaluation tasks as text and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from gptsmith.console import Text
from gptsmith.evaluate.result import Result

# Axis label and number format of metrics that are not shares. All shares (0 to 1) use one axis.
UNITS = {
    "val_loss": ("loss (nats per token, lower is better)", ",.4f"),
    "loss": ("loss (nats per text, lower is better)", ",.4f"),
    "perplexity": ("perplexity (lower is better)", ",.2f"),
    "bits_per_byte": ("bits per byte (lower is better)", ",.4f"),
    "bleu": ("BLEU (0 to 100)", ",.2f"),
    "score": ("the judge's score (0 to 100)", ",.1f"),
}
SHARE = ("share of the items", ".1%")

Difference = tuple[float, tuple[float, float] | None]  # and a 95% interval if one can be given


def format_value(metric: str, value: float, error: float = math.nan) -> str:
    """A value as text, with its standard error if there is one: `29.4% ± 0.5`."""
    form = UNITS.get(metric, SHARE)[1]
    if abs(value) >= 1e7:  # the perplexity of an untrained model
        form = ".3g"
    text = format(value, form)
    return f"{text} ± {format(error, form).rstrip('%')}" if math.isfinite(error) else text


def format_difference(metric: str, value: float, interval: tuple[float, float] | None) -> str:
    """A difference and its interval as text; of shares in percentage points: `+2.5 [-1.0, +6.0]
    pp`."""
    form = UNITS.get(metric, SHARE)[1]
    scale, form, unit = (100, ".1f", " pp") if form == SHARE[1] else (1, form, "")
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
    differences: Mapping[str, Mapping[str, Difference]] | None = None,
) -> Group:
    """A table per task: one row per metric, one column per run, and known scores to compare with.

    differences: of two runs, by task and metric, for a column of their own.
    """
    rows, tables = rows_of(runs), list[Text | Table]()
    for task in dict.fromkeys(task for task, _ in rows):
        references = {
            metric: references_of(runs, task, metric) for name, metric in rows if name == task
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
            found = [find(results, task, metric) for results in runs.values()]
            cells = [
                format_value(metric, r.metrics[metric], r.stderr.get(metric, math.nan)) if r else ""
                for r in found
            ]
            if differences is not None:
                difference = differences.get(task, {}).get(metric)
                cells.append(format_difference(metric, *difference) if difference else "")
            if has_references:
                cells.append(
                    "\n".join(f"{name} {format_value(metric, x)}" for name, x in known.items())
                )
            shown.add_row(metric, *cells)
        tables += [Text(f"{task}, {' / '.join(dict.fromkeys(counts))} items"), shown]
    return Group(*tables)


def rows_of(runs: Mapping[str, Sequence[Result]]) -> list[tuple[str, str]]:
    """(task, metric) of all runs, without duplicates, grouped by task."""
    tasks: dict[str, dict[str, None]] = {}
    for results in runs.values():
        for result in results:
            tasks.setdefault(result.task, {}).update(dict.fromkeys(result.metrics))
    return [(task, metric) for task, metrics in tasks.items() for metric in metrics]


def find(results: Sequence[Result], task: str, metric: str) -> Result | None:
    return next((r for r in results if r.task == task and metric in r.metrics), None)


def references_of(
    runs: Mapping[str, Sequence[Result]], task: str, metric: str
) -> Mapping[str, float]:
    found = (find(results, task, metric) for results in runs.values())
    return next((r.references[metric] for r in found if r and metric in r.references), {})

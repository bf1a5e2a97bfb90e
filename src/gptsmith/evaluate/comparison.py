"""Two runs compared on the items that both have, with the difference and its confidence interval;
and what else differs between the two measurements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from gptsmith.evaluate.report import Result, chance, mean, show

RESAMPLES = 10_000
SEED = 0
_Z = 1.96  # of a 95% interval
_PER_TOKEN = {"val_loss", "perplexity", "top1", "top5"}  # of the perplexity task

Key = tuple[object, ...]
Item = Mapping[str, Any]


class Difference(NamedTuple):
    """The first run's metric minus the second's, and a 95% interval if one can be given."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """A task of two runs, reduced to what can be compared. notes: what was left out, and what
    else differs."""

    first: Result
    second: Result
    differences: Mapping[str, Difference]
    notes: Sequence[str]

    def fields(self, first: str, second: str) -> dict[str, Any]:
        """For JSON; the arguments are the names of the runs."""
        fields: dict[str, Any] = {"n": self.first.n}
        for metric, (value, interval) in self.differences.items():
            a, b = self.first.metrics[metric], self.second.metrics[metric]
            fields[metric] = {first: a, second: b, "difference": value, "interval_95": interval}
        return fields | ({"notes": list(self.notes)} if self.notes else {})


def compare(names: tuple[str, str], first: Result, second: Result) -> Comparison:
    """Pair the items of two results of one task.

    Items are paired by `Result.key`. A metric that is a mean over items is that of the common ones;
    another one is kept only where both runs have the same items. Without items, as for perplexity,
    there is no interval.
    """
    task = first.task
    notes = _different_conditions(names, first, second)
    shared = [metric for metric in first.metrics if metric in second.metrics]
    for name, own, other in ((names[0], first, second), (names[1], second, first)):
        if only := [metric for metric in own.metrics if metric not in other.metrics]:
            notes.append(f"{task}: {', '.join(only)} of {name} alone: not compared")
    if first.conditions.get("tokenizer") != second.conditions.get("tokenizer"):
        shared = [metric for metric in shared if metric not in _PER_TOKEN]
        notes.append(
            f"{task}: the tokenizers differ, and so do the tokens: only bits_per_byte can be "
            "compared"
        )
    a, b = _by_key(first), _by_key(second)
    columns = {metric: column for metric in shared if (column := _column(metric, first, second))}

    def scored(item: Item) -> bool:
        return all(column(item) is not None for column in columns.values())

    common = [key for key in a if key in b and scored(a[key]) and scored(b[key])]
    if not (len(common) == len(a) == len(b)):
        shared = [*columns] if common else []
        notes.append(_left_out(names, first, second, len(common)))
    values = [
        {m: [columns[m](items[key]) for key in common] for m in columns if m in shared}
        for items in (a, b)
    ]
    one = _reduced(first, [a[key] for key in common], shared, values[0])
    two = _reduced(second, [b[key] for key in common], shared, values[1])
    differences = {}
    for metric in shared:
        found = None
        if metric in values[0]:
            found = interval(values[0][metric], values[1][metric], _transform(metric))
        differences[metric] = Difference(one.metrics[metric] - two.metrics[metric], found)
    return Comparison(one, two, differences, notes)


def interval(
    a: Sequence[float], b: Sequence[float], of: Callable[[Any], Any] = lambda mean: mean
) -> tuple[float, float] | None:
    """95% interval of of(mean(a)) - of(mean(b)), for values of the same items; None for a single
    item, and where all differences are equal.

    Right or wrong: Agresti and Min (2005), half an item added to each of the four cases, so that it
    has a width even where no item differs. Other values: percentile bootstrap over the items.
    """
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if len(differences) < 2:
        return None
    if {*a, *b} <= {0.0, 1.0}:
        n, gained = len(differences) + 2, float(differences.sum())
        changed = float(np.abs(differences).sum()) + 1
        centre, spread = gained / n, _Z * math.sqrt(changed - gained**2 / n) / n
        return max(-1.0, centre - spread), min(1.0, centre + spread)
    if np.ptp(differences) == 0:
        return None
    low, high = bootstrap(a, b, of=lambda means: of(means[0]) - of(means[1]))
    return low, high


def bootstrap(
    *columns: Sequence[float], of: Callable[[np.ndarray], Any] = lambda means: means[0]
) -> list[float]:
    """95% confidence interval of a function of the columns' means, by the percentile bootstrap over
    their rows (Efron 1979). Seeded: equal values have equal intervals."""
    x, draw = np.asarray(columns, dtype=np.float64), np.random.default_rng(SEED)  # (columns, rows)
    found = [
        of(x[:, draw.integers(x.shape[1], size=(100, x.shape[1]))].mean(axis=-1))
        for _ in range(RESAMPLES // 100)
    ]
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return [float(low), float(high)]


# --- items ---------------------------------------------------------------------------------------


def _by_key(result: Result) -> dict[Key, Item]:
    """The items by their key, and by a number where several have the same one."""
    seen: Counter[Key] = Counter()
    items = {}
    for item in result.items:
        key = tuple(item.get(name) for name in result.key)
        seen[key] += 1
        items[*key, seen[key]] = item
    return items


def _column(metric: str, *results: Result) -> Callable[[Item], Any] | None:
    """The values whose mean a metric is; None if it is not made of values of single items."""
    if not all(result.items for result in results):
        return None
    if all(metric in item for result in results for item in result.items):
        return lambda item: item[metric]
    if metric == "perplexity" and all("nats" in item for r in results for item in r.items):
        return lambda item: -item["nats"][0]
    return None


def _transform(metric: str) -> Callable[[Any], Any]:
    return (lambda nats: np.exp(np.minimum(nats, 700))) if metric == "perplexity" else lambda x: x


def _reduced(
    result: Result,
    items: Sequence[Item],
    metrics: Sequence[str],
    values: Mapping[str, Sequence[float]],
) -> Result:
    """The result of some of its items and metrics. values: of the items, by metric; a metric
    without any is kept as it is."""
    means, errors = {}, {}
    for metric in metrics:
        if metric not in values:
            means[metric] = result.metrics[metric]
            errors[metric] = result.stderr.get(metric, math.nan)
            continue
        centre, error = mean(values[metric])
        means[metric] = float(_transform(metric)(centre))
        errors[metric] = error * means[metric] if metric == "perplexity" else error
    known = {metric: dict(found) for metric, found in result.references.items()}
    for found in known.values():
        if "chance" in found and items:
            found["chance"] = chance([len(item["nats"]) for item in items])
    n = len(items) if result.items else result.n
    return replace(result, metrics=means, stderr=errors, n=n, references=known)


# --- notes ---------------------------------------------------------------------------------------


def _different_conditions(names: tuple[str, str], first: Result, second: Result) -> list[str]:
    a, b = first.conditions, second.conditions
    differ = [
        f"{name} {a.get(name)} and {b.get(name)}"
        for name in {**a, **b}
        if a.get(name) != b.get(name) and name != "tokenizer"
    ]
    if not differ:
        return []
    return [f"{first.task}: {' and '.join(names)} were measured differently: {'; '.join(differ)}"]


def _left_out(names: tuple[str, str], first: Result, second: Result, common: int) -> str:
    own = []
    for name, result in zip(names, (first, second), strict=True):
        values = ", ".join(f"{metric} {show(metric, x)}" for metric, x in result.metrics.items())
        own.append(f"{name} alone: {result.n:,} items, {values}")
    what = f"compared on the {common:,} items that both runs have"
    if not common:
        what = "not compared, because the runs have no item in common"
    return f"{first.task}: {what} ({'; '.join(own)})"

"""Compare two runs on their common items: differences with confidence intervals, and notes on what
else differs between the two measurements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptsmith.evaluate.report import Difference, format_value
from gptsmith.evaluate.result import Item, Result, Statistic, chance, mean_of

RESAMPLES = 10_000
SEED = 0
_Z = 1.96  # of a 95% interval
_PER_TOKEN = {"val_loss", "perplexity", "top1", "top5"}  # of the perplexity task
_WINDOW = ("on", "window", "stride", "tokenizer")  # conditions under which windows are the same

Key = tuple[object, ...]


@dataclass(frozen=True)
class Comparison:
    """The results of two runs on one task, reduced to what can be compared.

    differences: the first run's metrics minus the second's. notes: what was left out, and what else
    differs.
    """

    first: Result
    second: Result
    differences: Mapping[str, Difference]
    notes: Sequence[str]

    def fields(self, first: str, second: str) -> dict[str, Any]:
        """For JSON; the arguments are the names of the runs."""
        fields: dict[str, Any] = {"n": self.first.n}
        for metric, (difference, interval) in self.differences.items():
            values = (self.first.metrics[metric], self.second.metrics[metric], difference)
            a, b, value = (x if math.isfinite(x) else None for x in values)
            fields[metric] = {first: a, second: b, "difference": value, "interval_95": interval}
        return fields | ({"notes": list(self.notes)} if self.notes else {})


def compare(names: tuple[str, str], first: Result, second: Result) -> Comparison:
    """Pair the items of two results of one task by `Result.key`.

    Metrics are those of the items that both have. Where windows of text differ there are no common
    items: the metrics of all the text are compared, without an interval.
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
    if any(first.conditions.get(name) != second.conditions.get(name) for name in _WINDOW):
        first, second = (replace(result, items=()) for result in (first, second))
    a, b = _by_key(first), _by_key(second)
    common = [key for key in a if key in b]
    if not (len(common) == len(first.items) == len(second.items)):
        notes.append(_unmatched_note(names, first, second, len(common)))
        shared = [m for m in shared if _statistic(first, m)] if common else []
        first, second = (
            _with_items(result, shared, [items[key] for key in common])
            for result, items in ((first, a), (second, b))
        )
    differences = {}
    for metric in shared:
        found = None
        if common and (one := _statistic(first, metric)) and (two := _statistic(second, metric)):
            x, y = (s.columns([i[k] for k in common]) for s, i in ((one, a), (two, b)))
            found = interval(x, y, one.value, two.value)
        difference = first.metrics[metric] - second.metrics[metric]
        differences[metric] = (difference, found)
    first, second = (
        replace(result, metrics={metric: result.metrics[metric] for metric in shared})
        for result in (first, second)
    )
    return Comparison(first, second, differences, notes)


def interval(
    a: Any,
    b: Any,
    of_a: Callable[[np.ndarray], Any] = lambda means: means[..., 0],
    of_b: Callable[[np.ndarray], Any] | None = None,
) -> tuple[float, float] | None:
    """95% interval of of_a(means of a) - of_b(means of b), for columns (n, K) or (n,) of the same
    n items; None for a single item, and where no resample changes the difference.

    Right or wrong: Agresti and Min (2005), half an item added to each of the four cases, so that it
    has a width even where no item differs. Other values: percentile bootstrap over the items.
    """
    x, y = (np.asarray(values, np.float64).reshape(len(values), -1) for values in (a, b))
    if len(x) < 2:
        return None
    if x.shape[1] == 1 and np.isin([x, y], (0.0, 1.0)).all():
        differences = x - y
        n, gained = len(x) + 2, float(differences.sum())
        changed = float(np.abs(differences).sum()) + 1
        centre, spread = gained / n, _Z * math.sqrt(changed - gained**2 / n) / n
        return max(-1.0, centre - spread), min(1.0, centre + spread)
    K, of_b = x.shape[1], of_b or of_a
    low, high = bootstrap(np.hstack([x, y]), lambda m: of_a(m[..., :K]) - of_b(m[..., K:]))
    if not math.isfinite(high - low) or math.isclose(low, high, rel_tol=1e-12, abs_tol=1e-12):
        return None
    return low, high


def bootstrap(
    columns: Any, of: Callable[[np.ndarray], Any] = lambda means: means[..., 0]
) -> list[float]:
    """95% confidence interval of a function of the means of columns (n, K) or (n,), by the
    percentile bootstrap over their rows (Efron 1979). Seeded: equal values have equal intervals."""
    n, found, draw = len(columns), [], np.random.default_rng(SEED)
    x = np.asarray(columns, np.float64).reshape(n, -1)
    for _ in range(RESAMPLES // 100):
        drawn = draw.integers(n, size=(100, n)) + n * np.arange(100)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=100 * n).reshape(100, n)
        found.append(of(counts @ x / n))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return [float(low), float(high)]


# --- items ---------------------------------------------------------------------------------------


def _statistic(result: Result, metric: str) -> Statistic | None:
    """How the metric follows from the items; None if it does not."""
    if metric in result.statistics:
        return result.statistics[metric]
    return mean_of(metric) if all(metric in item for item in result.items) else None


def _by_key(result: Result) -> dict[Key, Item]:
    """The items by their key, numbered if several have the same one, without items that have no
    value, such as those without a judge's verdict."""
    seen: Counter[Key] = Counter()
    items = {}
    for item in result.items:
        key = tuple(item.get(name) for name in result.key)
        seen[key] += 1
        if all(item.get(metric, 0) is not None for metric in result.metrics):
            items[*key, seen[key]] = item
    return items


def _with_items(result: Result, metrics: Sequence[str], items: Sequence[Item]) -> Result:
    """The result recomputed for a part of its items, including the accuracy by chance."""
    known = {metric: dict(found) for metric, found in result.references.items()}
    for found in known.values():
        if "chance" in found and items:
            found["chance"] = chance([len(item["nats"]) for item in items])
    return replace(result, metrics=dict.fromkeys(metrics, 0.0), references=known).with_items(items)


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


def _unmatched_note(names: tuple[str, str], first: Result, second: Result, common: int) -> str:
    own = []
    for name, result in zip(names, (first, second), strict=True):
        values = ", ".join(
            f"{metric} {format_value(metric, x)}" for metric, x in result.metrics.items()
        )
        own.append(f"{name} alone: {result.n:,} items, {values}")
    what = f"compared on the {common:,} items that both runs have"
    if not common:
        what = "not compared, because the runs have no item in common"
    return f"{first.task}: {what} ({'; '.join(own)})"

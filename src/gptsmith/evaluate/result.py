"""Results of evaluation tasks: metrics, and the items from which they are computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gptsmith.tokenizer import Tokenizer

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Statistic:
    """How a metric is computed from items: a function of the means of some columns.

    columns: items -> a row of K numbers for each item that the metric is about.
    value: means (..., K) -> metrics (...). A ratio of sums (F1) is the same ratio of means.
    """

    columns: Callable[[Sequence[Item]], Any]
    value: Callable[[np.ndarray], Any]


def column(*names: str) -> Callable[[Sequence[Item]], Any]:
    """The named fields of items, as columns."""
    return lambda items: [[item[name] for name in names] for item in items]


def mean_of(name: str) -> Statistic:
    return Statistic(column(name), lambda means: means[..., 0])


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0)


def mean_share(part: np.ndarray, whole: np.ndarray) -> Any:
    """The mean over the last axis of part / whole, of classes or skills that occur."""
    return share(part, whole).sum(axis=-1) / (whole > 0).sum(axis=-1)


def exp(loss: Any) -> Any:
    """exp without overflow."""
    return np.exp(np.minimum(loss, 700))


@dataclass(frozen=True)
class Result:
    """Metrics of one task over n items, and the items themselves."""

    task: str
    n: int
    metrics: Mapping[str, float]
    """Shares are in 0..1. NaN and infinity are allowed; in JSON they are null."""
    stderr: Mapping[str, float]
    """Standard errors, by metric, of those that have one."""
    items: Sequence[Item] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further fields for the JSON: settings, intervals, counts."""
    notes: Sequence[str] = ()
    """Remarks that are needed to interpret the metrics, one line each."""
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores to compare with, by metric and name: chance, GPT-2 124M."""
    key: tuple[str, ...] = ("id",)
    """Fields that identify an item, to match it with the same one of another run."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """What the metrics depend on besides the model, and should be equal in a comparison."""
    statistics: Mapping[str, Statistic] = field(default_factory=dict, repr=False, compare=False)
    """For metrics that are not simply the mean of the items' field of the same name."""

    @classmethod
    def from_items(
        cls, task: str, items: Sequence[Item], metrics: Sequence[str], **fields: Any
    ) -> Result:
        """The result of items: each metric, and its standard error if it is a mean."""
        return cls(task, len(items), dict.fromkeys(metrics, 0.0), {}, **fields).with_items(items)

    def with_items(self, items: Sequence[Item]) -> Result:
        """The same result computed from other items. ValueError for none."""
        metrics, stderr = {}, {}
        for name in self.metrics:
            statistic = self.statistics.get(name, mean_of(name))
            columns = statistic.columns(items)
            rows = np.asarray(columns, np.float64).reshape(len(columns), -1)
            if rows.shape[1] > 1:
                metrics[name] = float(statistic.value(rows.mean(axis=0)))
                continue
            centre, error = mean(rows[:, 0].tolist())
            metrics[name] = float(statistic.value(np.array([centre])))
            # perplexity: to first order
            stderr[name] = error * (metrics[name] if name == "perplexity" else 1)
        return replace(self, n=len(items), items=items, metrics=metrics, stderr=stderr)

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
    """The form of the prompt, for `conditions`: plain text, or a chat template by its digest."""
    if template is None:
        return "plain text"
    return f"chat template {hashlib.sha256(template.encode()).hexdigest()[:8]}"


def left_out_note(task: str, ids: Sequence[str], total: int, why: str) -> str:
    """A note on questions that are left out."""
    names = f"{', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}"
    return (
        f"{task}: {len(ids):,} of {total:,} questions are left out: {why} "
        f"({len(ids) / total:.0%}: {names})"
    )


def encodable_indices(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[int], str]:
    """Indices of the texts that the tokenizer can encode, and why it cannot encode the others (a
    character tokenizer does not know every character)."""
    known, why = [], ""
    for i, text in enumerate(texts):
        try:
            tokenizer.encode(text)
            known.append(i)
        except ValueError as error:
            why = why or f"the tokenizer cannot encode them ({error})"
    return known, why


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

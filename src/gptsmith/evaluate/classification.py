"""Predictions of a classifier and their quality: accuracy, precision, recall, F1, confusion.

B batch, T time, N texts, L classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Column, Table

from gptsmith.data.classification import encode_texts, pad
from gptsmith.data.labelled import LabelledText
from gptsmith.evaluate.result import Item, Result, Statistic, mean_share, share
from gptsmith.model.classifier import GPTClassifier
from gptsmith.run import Run
from gptsmith.terminal import counted
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import distributed
from gptsmith.train.runtime import Precision, evaluating


def log_probabilities(
    model: GPTClassifier,
    rows: Sequence[np.ndarray],
    precision: Precision,
    pad_id: int = 0,
    batch_size: int = 32,
) -> np.ndarray:
    """ln p of each class for token sequences, (N, L) fp64, in the order of `rows`.

    Texts of similar length share a batch. The model's mode (train or eval) is restored. Several
    ranks take turns with the batches; all get the result for all texts.
    """
    device = model.score.weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = np.zeros((len(rows), len(model.config.labels)))
    ranks, rank = distributed.world_size(), distributed.rank()
    with evaluating(model, precision):
        for first in range(rank * batch_size, len(order), ranks * batch_size):
            taken = order[first : first + batch_size]
            ids, lengths = pad([rows[i] for i in taken], pad_id, model.config.context_length)
            logits = model.logits(ids.to(device), lengths.to(device))  # (B, L)
            found[taken] = logits.cpu().double().log_softmax(dim=-1).numpy()
    return distributed.sum_over_ranks(torch.from_numpy(found)).numpy()


def max_length(run: Run) -> int:
    """How many tokens of a text the classifier of a run reads: as many as in tuning."""
    return int(run.config.get("context_length") or run.model_config.context_length)


def predict(
    model: GPTClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    T: int,
    precision: Precision,
    batch_size: int = 32,
) -> tuple[list[dict[str, Any]], int]:
    """A prediction per text, and how many texts were truncated to T tokens."""
    ids, truncated = encode_texts(tokenizer, texts, T)
    p = np.exp(log_probabilities(model, ids, precision, batch_size=batch_size))
    return [prediction(model.config.labels, row) for row in p], truncated


def prediction(labels: Sequence[str], p: np.ndarray) -> dict[str, Any]:
    """The likeliest class of one text, and the probabilities (L,) of all classes by name."""
    return {
        "predicted": labels[int(p.argmax())],
        "probabilities": {label: round(float(x), 6) for label, x in zip(labels, p, strict=True)},
    }


@dataclass(frozen=True)
class Scores:
    """Scores of a classifier on N labelled texts.

    counts (L, L): texts of class i (row) that were predicted as class j (column).
    """

    labels: tuple[str, ...]
    counts: np.ndarray
    loss: float  # mean of -ln p(true class), nats

    @property
    def accuracy(self) -> float:
        return float(self.counts.trace() / self.counts.sum())

    @property
    def majority(self) -> float:
        """Accuracy of always predicting the most frequent class."""
        return float(self.support.max() / self.counts.sum())

    @property
    def support(self) -> np.ndarray:
        """Number of texts of each class, (L,)."""
        return self.counts.sum(axis=1)

    @property
    def precision(self) -> np.ndarray:
        """Share of the texts predicted as a class that belong to it, (L,); 0 if there are none."""
        return share(self.counts.diagonal(), self.counts.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:
        """Share of the texts of a class that were predicted as it, (L,); 0 if there are none."""
        return share(self.counts.diagonal(), self.support)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, (L,); 0 where both are 0."""
        return share(2 * self.counts.diagonal(), self.counts.sum(axis=0) + self.support)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur as truth or prediction; each class counts the same."""
        return float(mean_share(2 * self.counts.diagonal(), self.counts.sum(axis=0) + self.support))

    @property
    def accuracy_95(self) -> tuple[float, float]:
        """95% interval of the accuracy (Wilson 1927), inside 0 to 1, with a width at both."""
        z, n, share = 1.96, int(self.counts.sum()), self.accuracy
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        spread = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return float(max(0.0, centre - spread)), float(min(1.0, centre + spread))

    def per_class(self) -> Iterator[tuple[str, float, float, float, int]]:
        """Each class with its precision, recall, F1 and number of texts."""
        columns = (self.precision, self.recall, self.f1, self.support)
        return zip(self.labels, *(column.tolist() for column in columns), strict=True)

    def fields(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "loss": self.loss,
            "majority_accuracy": self.majority,
            "texts": int(self.counts.sum()),
            "classes": {
                label: {"precision": p, "recall": r, "f1": f, "support": n}
                for label, p, r, f, n in self.per_class()
            },
            "confusion": {"labels": list(self.labels), "counts": self.counts.tolist()},
        }


def score(labels: Sequence[str], log_p: np.ndarray, classes: Sequence[int]) -> Scores:
    """Scores of ln p (N, L) against the true class numbers (N,); ties predict the first class.

    ValueError without texts.
    """
    truth = np.asarray(classes, dtype=np.int64)
    if not len(truth):
        raise ValueError("nothing to score: no texts")
    L = len(labels)
    counts = np.bincount(truth * L + log_p.argmax(axis=1), minlength=L * L).reshape(L, L)
    return Scores(tuple(labels), counts, float(-log_p[np.arange(len(truth)), truth].mean()))


def result(
    labels: Sequence[str],
    rows: Sequence[LabelledText],
    log_p: np.ndarray,
    classes: Sequence[int],
    notes: Sequence[str] = (),
) -> Result:
    """The scores as a result of `evaluate`, with an item per text.

    accuracy has a standard error and a 95% interval (Wilson 1927), and the majority class of these
    texts to compare with.
    """
    scores = score(labels, log_p, classes)
    items = [
        {
            "id": row.place,
            "label": row.label,
            **prediction(labels, p),
            "accuracy": float(int(p.argmax()) == true),
            "loss": float(-log_p[i, true]),
        }
        for i, (row, p, true) in enumerate(zip(rows, np.exp(log_p), classes, strict=True))
    ]
    fields = scores.fields()
    metrics = {name: fields.pop(name) for name in ("accuracy", "macro_f1", "loss")}
    made = Result.from_items(
        "classify",
        items,
        list(metrics),
        details={"accuracy_95": [*scores.accuracy_95], **fields},
        notes=notes,
        references={"accuracy": {"majority class": scores.majority}},
        statistics={"macro_f1": macro_f1(labels)},
    )
    return replace(made, metrics=metrics)


def macro_f1(labels: Sequence[str]) -> Statistic:
    """The mean F1 of the classes that occur, from the items of `result`."""

    def columns(items: Sequence[Item]) -> np.ndarray:
        """Whether each text belongs to each class, is predicted as it, and both: (n, 3 L)."""
        truth, found = (
            np.array([[item[name] == label for label in labels] for item in items])
            for name in ("label", "predicted")
        )
        return np.hstack([truth, found, truth & found])

    def value(means: np.ndarray) -> Any:
        truth, found, both = np.split(means, 3, axis=-1)
        return mean_share(2 * both, truth + found)

    return Statistic(columns, value)


def scores_of(result: Result) -> Scores:
    """The scores that a result was made of."""
    confusion = result.details["confusion"]
    return Scores(tuple(confusion["labels"]), np.array(confusion["counts"]), result.metrics["loss"])


def summary(scores: Scores) -> str:
    """Accuracy with its interval, macro-F1 and the majority class, in one line."""
    n = int(scores.counts.sum())
    low, high = scores.accuracy_95
    return (
        f"accuracy {scores.accuracy:.2%} (95% interval {low:.1%} to {high:.1%}), macro-F1 "
        f"{scores.macro_f1:.3f} over {counted(n, 'text')} (majority class: {scores.majority:.2%})"
    )


def table(scores: Scores) -> Table:
    """Precision, recall, F1 and support of each class, for the terminal."""
    head, *rows, foot = _cells(scores)
    made = Table(head[0], *(Column(name, justify="right") for name in head[1:]))
    for row in rows:
        made.add_row(*row)
    made.add_section()
    made.add_row(*foot)
    return made


def markdown(scores: Scores) -> list[str]:
    """The same table as lines of Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in _cells(scores)]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cells(scores: Scores) -> list[list[str]]:
    occurs = scores.counts.sum(axis=0) + scores.support > 0  # the classes that macro-F1 counts
    means = (scores.precision[occurs].mean(), scores.recall[occurs].mean(), scores.macro_f1)
    rows = [*scores.per_class(), ("mean", *means, scores.counts.sum())]
    return [
        ["class", "precision", "recall", "F1", "texts"],
        *([label, f"{p:.3f}", f"{r:.3f}", f"{f:.3f}", f"{n:,}"] for label, p, r, f, n in rows),
    ]

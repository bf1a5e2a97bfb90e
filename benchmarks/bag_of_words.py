"""Bag-of-words accuracy on labelled texts: the baseline that a tuned GPT has to beat.

    python -m benchmarks bag_of_words [--run RUN2] [--data FILE [--val FILE] [--test FILE] ...]

Logistic regression on tf-idf weights of words, and of words and pairs of words, the L2 penalty and
the kind of features chosen on the validation split; trained, chosen and tested on exactly the rows
that `gptsmith finetune classify` takes with the same options. --run takes the options of a tuned
run and prints its test accuracy too.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.config import load_config
from gptsmith.data.classification import load_labelled
from gptsmith.data.labelled import LabelledText
from gptsmith.data.options import LabelledConfig
from gptsmith.run import Run

PENALTIES = tuple(10.0**e for e in (-7, -6.5, -6, -5.5, -5, -4.5, -4, -3.5))  # per text


class Options(LabelledConfig):
    """Bag-of-words baseline."""

    data: Path | None = None  # type: ignore[assignment]
    run: Path | None = None
    """A run of `finetune classify` to compare with; its data and split are used."""


class Features:
    """Unit vectors of tf-idf weights, (1 + ln count) * (1 + ln(texts / texts with the word)).

    The words are those of the training texts; with pairs, also two words in a row.
    """

    def __init__(self, texts: Sequence[str], pairs: bool) -> None:
        self.pairs = pairs
        found = Counter(word for text in texts for word in set(self.words(text)))
        self.column = {word: i for i, word in enumerate(sorted(found))}
        self.weight = [1 + math.log(len(texts) / found[word]) for word in self.column]

    def words(self, text: str) -> list[str]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return words + [f"{a} {b}" for a, b in pairwise(words) if self.pairs]

    def __call__(self, texts: Iterable[str]) -> Bags:
        columns: list[int] = []
        values: list[float] = []
        rows: list[int] = []
        for row, text in enumerate(texts):
            counts = Counter(self.column[w] for w in self.words(text) if w in self.column)
            cells = {c: (1 + math.log(n)) * self.weight[c] for c, n in counts.items()}
            norm = math.sqrt(sum(v * v for v in cells.values()))
            rows += [row] * len(cells)
            columns += cells
            values += [v / norm for v in cells.values()]
        return Bags(
            torch.tensor(rows), torch.tensor(columns), torch.tensor(values).unsqueeze(1), row + 1
        )


class Bags(NamedTuple):
    """A sparse matrix: row, column and value of each cell, and how many rows there are."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    N: int

    def logits(self, w: Tensor) -> Tensor:
        """Rows times weights, plus bias: w (V + 1, L) -> (N, L)."""
        found = w[-1].expand(self.N, -1)
        return found.index_add(0, self.rows, w[:-1][self.columns] * self.values)

    def accuracy(self, w: Tensor, y: Tensor) -> float:
        return float((self.logits(w).argmax(dim=1) == y).float().mean())


def fit(X: Bags, y: Tensor, start: Tensor, penalty: float) -> Tensor:
    """Weights and bias (V + 1, L) of least cross-entropy + penalty / 2 * |weights|^2, by L-BFGS."""
    w = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [w], max_iter=150, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(X.logits(w), y) + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return w.detach()


def compare(options: Options) -> None:
    started = time.perf_counter()
    if options.run:
        stored = Run.open(options.run).config
        fields = {n: stored[n] for n in LabelledConfig.model_fields}
        options = options.model_copy(update=LabelledConfig(**fields).model_dump())
    data = load_labelled(options)
    number = {label: i for i, label in enumerate(data.labels)}

    def classes(rows: Sequence[LabelledText]) -> Tensor:
        return torch.tensor([number[row.label] for row in rows])

    y, y_val = classes(data.train), classes(data.val)
    best = (-1.0, "", 0.0)  # accuracies on val, the features' name, and on the test
    for pairs in (False, True):
        features = Features([row.text for row in data.train], pairs)
        train, val, test = (
            features(row.text for row in part) for part in (data.train, data.val, data.test)
        )
        w = torch.zeros(len(features.column) + 1, len(data.labels))
        for penalty in sorted(PENALTIES, reverse=True):  # each starts from its stronger neighbour
            w = fit(train, y, w, penalty)
            reached = val.accuracy(w, y_val)
            if reached > best[0]:
                name = f"{'words and pairs' if pairs else 'words'}, penalty {penalty:.1e}"
                best = (reached, name, test.accuracy(w, classes(data.test)))
    y, found = classes(data.test), best[2]
    majority = float(torch.bincount(y).max() / len(y))
    print(f"{options.data}: {', '.join(data.notes[-3:])}")
    print(f"  most frequent class  {majority:.2%}")
    print(f"  bag of words         {found:.2%} +- {math.sqrt(found * (1 - found) / len(y)):.2%}"
          f"   ({best[1]}; val {best[0]:.2%}; {time.perf_counter() - started:.0f} s)")  # fmt: skip
    if options.run:
        tuned = json.loads((options.run / "test.json").read_text())["accuracy"]
        error = math.sqrt(tuned * (1 - tuned) / len(y))
        print(f"  {options.run!s:<19}  {tuned:.2%} +- {error:.2%}")


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)  # the operations are small
    options = load_config(Options, argv, prog="python -m benchmarks bag_of_words")
    if options.data or options.run:
        compare(options)
        return
    folder = Path(os.environ.get("GPTSMITH_DATA", "../shared/data"))
    spam, stars = folder / "sms_spam" / "SMSSpamCollection", folder / "sst2_sentences"
    if not spam.is_file():
        print("no labelled texts: give --data FILE, or set GPTSMITH_DATA")
        return
    compare(Options(data=spam))
    train, val, test = (stars / f"stsa.binary.{name}" for name in ("train", "dev", "test"))
    compare(Options(data=train, val=val, test=test))

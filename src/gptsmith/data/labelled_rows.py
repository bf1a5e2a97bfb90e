"""Labelled texts as batches of padded rows, in an order that is a function of (seed, epoch, index).

B batch, T time (of the longest row in the batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.dataset import permutation
from gptsmith.data.labelled_files import LabelledText
from gptsmith.tokenizer import Tokenizer

MULTIPLE = 8  # widths that matrix products like


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], T: int
) -> tuple[list[np.ndarray], int]:
    """Ids of each text, white space at its ends left away, cut after T; and how many were cut.

    ValueError for a text that has no token.
    """
    ids = tokenizer.encode_arrays([text.strip() for text in texts])
    for text, row in zip(texts, ids, strict=True):
        if not len(row):
            raise ValueError(f"text {text[:40]!r} has no token: there is nothing to classify")
    return [row[:T] for row in ids], sum(len(row) > T for row in ids)


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as ids, with the number of the class of each, and how many texts were cut."""

    ids: list[np.ndarray]
    classes: list[int]
    cut: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def take(self, count: int) -> EncodedTexts:
        """So many of them, evenly from the whole; all of them, if there are not more."""
        n = len(self.ids)
        count = max(1, min(count, n))
        at = [i * n // count for i in range(count)]
        return EncodedTexts([self.ids[i] for i in at], [self.classes[i] for i in at], self.cut)


def encode_labelled(
    tokenizer: Tokenizer, rows: Sequence[LabelledText], labels: Sequence[str], T: int
) -> EncodedTexts:
    """encode_texts of labelled texts; one that cannot be encoded is named by its place."""
    number = {label: i for i, label in enumerate(labels)}
    try:
        ids, cut = encode_texts(tokenizer, [row.text for row in rows], T)
    except ValueError:
        for row in rows:
            try:
                encode_texts(tokenizer, [row.text], T)
            except ValueError as error:
                raise ValueError(f"{row.place}: {error}") from None
        raise
    return EncodedTexts(ids, [number[row.label] for row in rows], cut)


def pad(rows: Sequence[np.ndarray], pad_id: int, limit: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with padding on the right, T a multiple of 8 up to limit, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    T = min(limit, -(-int(lengths.max()) // MULTIPLE) * MULTIPLE)
    ids = torch.full((len(rows), T), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return ids, lengths


class LabelledRows:
    """Samples of a classifier: an epoch takes each text once, in a new order.

    T: at least the longest text's. step: samples of one optimizer step;
    inside each, rows are sorted by length, so that micro-batches, which are consecutive samples,
    need little padding while the step as a whole stays a random draw (sorting over more than a step
    would give steps of one class where length and class go together, as in spam). documents:
    padding is marked as another document, for masks that look ahead.
    """

    def __init__(
        self,
        texts: EncodedTexts,
        T: int,
        seed: int,
        pad_id: int,
        step: int = 1,
        documents: bool = False,
    ) -> None:
        assert texts.ids
        assert max(map(len, texts.ids)) <= T
        self.texts, self.T, self.seed, self.pad_id = texts, T, seed, pad_id
        self.step, self.documents = step, documents
        self.per_epoch = len(texts.ids)
        self._order = lru_cache(2)(self._make_order)
        self._sorted = lru_cache(2)(self._make_sorted)

    def _make_order(self, epoch: int) -> np.ndarray:
        return permutation(self.per_epoch, self.seed, epoch)

    def _make_sorted(self, first: int, end: int) -> list[int]:
        """Rows of the samples first..end-1, which lie in one epoch, by length."""
        epoch, at = divmod(first, self.per_epoch)
        found = self._order(epoch)[at : at + end - first]
        return sorted(found.tolist(), key=lambda i: len(self.texts.ids[i]))

    def __getitem__(self, index: int) -> int:
        """The row that is sample `index` of the endless run."""
        step, epoch = index - index % self.step, index - index % self.per_epoch
        first, end = max(step, epoch), min(step + self.step, epoch + self.per_epoch)
        return self._sorted(first, end)[index - first]

    def batch(self, first: int, count: int) -> Batch:
        """Samples first..first+count-1. targets hold the class number at each row's last token."""
        found = [self[i] for i in range(first, first + count)]
        ids, lengths = pad([self.texts.ids[i] for i in found], self.pad_id, self.T)
        at = torch.arange(ids.shape[1])
        last = (lengths - 1).unsqueeze(1)  # (B, 1)
        classes = torch.tensor([self.texts.classes[i] for i in found]).unsqueeze(1)
        return Batch(
            inputs=ids,
            targets=torch.where(at == last, classes, IGNORE_INDEX),
            documents=(at > last).long() if self.documents else None,
            name=f"samples {first}..{first + count - 1}",
            tokens=int(lengths.sum()),
        )

    def position(self, index: int) -> dict[str, int]:
        """Where the endless run stands before sample `index`."""
        epoch, at = divmod(index, self.per_epoch)
        return {"seed": self.seed, "epoch": epoch, "index": at, "per_epoch": self.per_epoch}

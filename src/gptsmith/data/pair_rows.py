"""Training batches of pairs: the rows of the chosen answers, then those of the rejected ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from gptsmith.batch import Batch, PairBatch
from gptsmith.data.order import StepSortedOrder, evenly_spaced
from gptsmith.data.packing import fill_batch, padded_width
from gptsmith.data.pairs import Pairs
from gptsmith.data.same_prefixes import same_prefixes


class PairRows(StepSortedOrder):
    """Batches of pairs: an epoch takes each pair once, in a new order (see StepSortedOrder).

    T          tokens of a pair of the longest conversations
    reference  (pairs, 2) fp32: log-probabilities of the chosen and of the rejected answer; None for
               a loss without a reference
    """

    def __init__(
        self, pairs: Pairs, seed: int, pad_id: int, step: int = 1, *, documents: bool = False,
        shared: bool = False,
    ) -> None:  # fmt: skip
        """step: pairs of an optimizer step. documents: mark padding as another document, for masks
        that look ahead. shared: compute a pair's prompt once, for masks that permit it, without
        dropout."""
        super().__init__(pairs.lengths, seed, step)
        self.pairs, self.pad_id, self.documents, self.shared = pairs, pad_id, documents, shared
        self._width = int(pairs.lengths.max()) - 1
        self.T = 2 * self._width
        self.fixed = False  # all rows as long as the longest: a compiled graph is for one shape
        self.reference: Tensor | None = None

    def batch(self, first: int, count: int) -> PairBatch:
        """Pairs first..first+count-1 of the endless sequence, in 2 * count rows."""
        return self.of([self.item(i) for i in range(first, first + count)])

    def groups(self, B: int, limit: int | None = None) -> Iterator[list[int]]:
        """The numbers of all pairs, or of pairs of about `limit` tokens that are spread evenly over
        the set, in groups of at most B pairs of similar length."""
        n = len(self.pairs)
        keep = n if limit is None else max(1, n * limit // self.pairs.tokens)
        numbers = sorted(evenly_spaced(n, keep), key=lambda i: int(self.lengths[i]))
        for at in range(0, len(numbers), B):
            yield numbers[at : at + B]

    def of(self, numbers: Sequence[int]) -> PairBatch:
        """The pairs of these numbers as one batch."""
        examples = [self.pairs.examples[2 * i + side] for side in (0, 1) for i in numbers]
        longest = max(len(example.ids) - 1 for example in examples)
        width = self._width if self.fixed else padded_width(longest, self._width)
        rows = [[example] for example in examples]
        batch = fill_batch(rows, width, self.pad_id, packed=self.documents)
        values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        reference = None
        if self.reference is not None:
            reference = self.reference[torch.tensor(numbers)].T.flatten()
        if self.shared and not self.fixed:
            lengths = np.array([len(example.ids) - 1 for example in examples])
            values["same_as"] = same_prefixes(batch.inputs.numpy(), lengths)
        return PairBatch(**{**values, "count": len(numbers)}, reference=reference)

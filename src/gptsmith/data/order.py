"""Random orders as pure functions of their keys.

An order has no state: sample i of a run is the same for any number of ranks, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of 0..n-1 that depends on the key alone, (n,) int64.

    It sorts raw Philox words instead of using Generator.permutation: NumPy guarantees that streams
    of bit generators never change, but not those of Generator's methods (NEP 19).
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


def evenly_spaced(n: int, count: int) -> list[int]:
    """`count` of the numbers 0..n-1, evenly spaced; at most all of them."""
    count = min(count, n)
    return [i * n // count for i in range(count)]


class Epochs:
    """An endless sequence of samples, the same number in each epoch."""

    def __init__(self, per_epoch: int, seed: int) -> None:
        self.per_epoch, self.seed = per_epoch, seed

    def position(self, index: int) -> dict[str, int]:
        """The position before sample `index`, as a checkpoint records it."""
        epoch, at = divmod(index, self.per_epoch)
        return {"seed": self.seed, "epoch": epoch, "index": at, "per_epoch": self.per_epoch}


class EpochOrder(Epochs):
    """An endless sequence of epochs, each of which has every item once, in a new random order."""

    def __init__(self, per_epoch: int, seed: int) -> None:
        super().__init__(per_epoch, seed)
        # two epochs' orders are in use where a batch reaches from one into the next
        self._items = lru_cache(2)(lambda epoch: permutation(self.per_epoch, seed, epoch))

    def item(self, index: int) -> int:
        """The number of the item at `index` of the sequence."""
        epoch, at = divmod(index, self.per_epoch)
        return int(self._items(epoch)[at])


class StepSortedOrder(EpochOrder):
    """An EpochOrder whose items are sorted by length within each optimizer step.

    So micro-batches, which are consecutive items, need little padding, while the step as a whole
    stays a random draw. (Sorting over more than a step would give steps of one class where length
    and class correlate, as in spam.)
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, seed: int, step: int) -> None:
        """lengths: of the items. step: items of an optimizer step."""
        super().__init__(len(lengths), seed)
        self.lengths, self.step = lengths, step
        self._sorted = lru_cache(2)(self._make_sorted)

    def _make_sorted(self, first: int, end: int) -> list[int]:
        """The items first..end-1 of the sequence, which are in one epoch, by length."""
        items = [super(StepSortedOrder, self).item(i) for i in range(first, end)]
        return sorted(items, key=lambda i: int(self.lengths[i]))

    def item(self, index: int) -> int:
        step, epoch = index - index % self.step, index - index % self.per_epoch
        first, end = max(step, epoch), min(step + self.step, epoch + self.per_epoch)
        return self._sorted(first, end)[index - first]

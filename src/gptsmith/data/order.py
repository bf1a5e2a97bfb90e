"""Random orders as pure functions of their keys.

An order has no state: sample i of a run is the same for any number of ranks, and after a resume.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of 0..n-1 that depends on the key alone, (n,) int64.

    It sorts raw Philox words instead of using Generator.permutation: NumPy guarantees that streams
    of bit generators never change, but not those of Generator's methods (NEP 19).
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


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

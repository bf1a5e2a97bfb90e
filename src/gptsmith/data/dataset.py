"""Training and validation windows of a prepared corpus.

The order of training samples is a pure function of (seed, epoch, index), without replacement; see
data/order.py. B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.order import Epochs, evenly_spaced, permutation
from gptsmith.data.shards import Shards
from gptsmith.tokenizer import DocumentTokens


class Windows(Epochs):
    """Windows of T tokens and their targets over shards, in a new order in each epoch.

    As a data set for `torch.utils.data.DataLoader`, it holds the windows of the first epoch:
    `len(windows)` pairs (inputs, targets) of int64 tensors (T,). A training run calls `batch`
    instead, for samples of an endless sequence of epochs.

    An epoch reads the shards in a new order and, in each, its windows in a new order and from a
    new phase: token 0 of the first window is one of the shard's first `stride` tokens. A batch
    therefore reads one or two shards, which suits disks and page caches.

    Raises ValueError if no shard holds T + 1 tokens.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        T: int,
        seed: int = 0,
        documents: DocumentTokens | None = None,
        mask_targets_before: int = 0,
        stride: int | None = None,
        context_only: Sequence[int] = (),
    ) -> None:
        """documents: the tokens around a document, if attention is restricted to documents.
        mask_targets_before: number of positions at the start of each row that are not targets
        (model/target_leakage.py). stride: tokens from one window to the next; windows overlap if
        it is less than T, the default. context_only: ids that are never targets."""
        if isinstance(shards, np.ndarray):
            raise ValueError("shards is one array, several are expected: give a list, [shard]")
        self.shards, self.T, self.documents = shards, T, documents
        self.context_only = tuple(context_only)
        self.lengths = shards.lengths if isinstance(shards, Shards) else [len(s) for s in shards]
        self.stride = stride or T
        self.mask_targets_before = mask_targets_before
        self.counts = np.array([max(0, (n - 1 - T) // self.stride + 1) for n in self.lengths])
        super().__init__(int(self.counts.sum()), seed)
        if not self.per_epoch:
            total = sum(self.lengths)
            what, remedy = f"the training tokens ({total:,})", "use more text"
            if total > T:
                what = f"the tokens of the largest shard ({max(self.lengths):,})"
                remedy = "prepare again with larger --shard-tokens"
            raise ValueError(
                f"{what} are fewer than context_length + 1 = {T + 1}: {remedy} or a shorter context"
            )
        # Two shards' orders are in use at a time, where a batch extends from one into the next.
        self._order = lru_cache(4)(self._make_order)
        self._shards = lru_cache(2)(self._make_shards)

    def _make_order(self, epoch: int, shard: int) -> tuple[int, np.ndarray]:
        key = (self.seed, epoch, shard)
        phase = int(np.random.Philox(np.random.SeedSequence((*key, 1))).random_raw() % self.stride)
        return phase, permutation(int(self.counts[shard]), *key, 0)

    def _make_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # SeedSequence pads keys with zeros: (seed, epoch) would be the key of shard 0's windows.
        order = permutation(len(self.shards), self.seed, epoch, 0, 2)
        return order, np.cumsum(self.counts[order])

    def __repr__(self) -> str:
        shards = f"{len(self.shards)} shards, seed {self.seed}"
        return f"Windows({self.per_epoch:,} per epoch of {self.T:,} tokens, {shards})"

    def __len__(self) -> int:
        return self.per_epoch

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (T,) int64 of a window of the first epoch; IndexError beyond it."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        batch = self.batch(index, 1)
        return batch.inputs[0], batch.targets[0]

    def row(self, index: int) -> np.ndarray:
        """Sample `index` of the endless sequence, (T + 1,) in the shards' dtype."""
        epoch, index = divmod(index, self.per_epoch)
        order, ends = self._shards(epoch)
        at = int(np.searchsorted(ends, index, side="right"))
        shard = int(order[at])
        phase, windows = self._order(epoch, shard)
        n = int(windows[index - (int(ends[at]) - int(self.counts[shard]))])
        # Shifted by the phase, the last window might overrun the shard; it overlaps the one before.
        start = min(phase + n * self.stride, self.lengths[shard] - 1 - self.T)
        return self.shards[shard][start : start + self.T + 1]

    def batch(self, first: int, count: int) -> Batch:
        """Samples first..first+count-1 as one batch (count, T)."""
        rows = np.stack([self.row(i) for i in range(first, first + count)]).astype(np.int64)
        name = f"samples {first}..{first + count - 1}"
        return make_batch(
            rows, self.documents, name, self.mask_targets_before, context_only=self.context_only
        )


def make_batch(
    rows: np.ndarray,
    document_tokens: DocumentTokens | None,
    name: str,
    mask_targets_before: int | np.ndarray = 0,
    mask_targets_from: int | np.ndarray | None = None,
    context_only: Sequence[int] = (),
) -> Batch:
    """rows (B, T + 1) of ids -> inputs and targets (B, T), and, with document_tokens, the document
    number of each position.

    Only positions from mask_targets_before up to mask_targets_from are targets: one number for all
    rows, or one for each (B,). Ids in context_only are never targets.
    """
    tokens = torch.from_numpy(rows)
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()  # masking must not change both
    positions = np.arange(inputs.shape[1])
    masked = positions < np.reshape(mask_targets_before, (-1, 1))
    if mask_targets_from is not None:
        masked = masked | (positions >= np.reshape(mask_targets_from, (-1, 1)))
    if context_only:
        masked = masked | np.isin(rows[:, 1:], context_only)
    targets.masked_fill_(torch.from_numpy(masked), IGNORE_INDEX)
    documents = None
    if document_tokens is not None:  # counting their beginnings numbers the documents of a row
        documents = torch.from_numpy(document_tokens.starts(rows[:, :-1])).cumsum(dim=1)
    return Batch(inputs, targets, documents=documents, name=name)


def validation_windows(
    shards: Sequence[np.ndarray], T: int, limit: int | None, stride: int
) -> list[tuple[int, int]]:
    """Shard and first token of each window of `validation_batches`."""
    windows = [
        (s, i)
        for s, shard in enumerate(shards)
        for i in range(0, max(1, len(shard) - 1 - (T - stride)), stride)
        if len(shard) > 1
    ]
    if limit is None:
        return windows
    return [windows[i] for i in evenly_spaced(len(windows), max(1, limit // stride))]


def validation_batches(
    shards: Sequence[np.ndarray],
    T: int,
    B: int,
    documents: DocumentTokens | None,
    limit: int | None = None,
    stride: int | None = None,
    mask_targets_before: int = 0,
    context_only: Sequence[int] = (),
) -> Iterator[Batch]:
    """Windows of T over each shard; every token except the shard's first is a target once.

    stride: tokens from one window to the next (default T: they are disjoint). With a shorter one,
    each target has at least T - stride tokens of context, at T / stride times the cost. limit: use
    evenly spaced windows of about this many tokens (None: all). Others: see Windows.
    """
    stride = stride or T
    windows = validation_windows(shards, T, limit, stride)
    for first in range(0, len(windows), B):
        chunk = windows[first : first + B]
        rows = np.zeros((len(chunk), T + 1), dtype=np.int64)
        before, end = [], []
        for row, (s, i) in zip(rows, chunk, strict=True):
            tokens = shards[s][i : i + T + 1]
            row[: len(tokens)] = tokens
            # Tokens that two windows share are targets in the first of them only.
            before.append(max(mask_targets_before, T - stride if i else 0))
            end.append(len(tokens) - 1)
        name = f"validation window {first}"
        yield make_batch(rows, documents, name, np.array(before), np.array(end), context_only)

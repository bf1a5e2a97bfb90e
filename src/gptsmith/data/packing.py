"""Training batches of examples: packed (several per row), or padded (one per row).

An example of n tokens takes n - 1 positions: its last token is a target only. B rows, T positions.
As in dataset.Windows, the examples of a row of the endless sequence are a pure function of
(seed, epoch, index), without replacement.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.examples import Example, Examples
from gptsmith.data.order import EpochOrder, evenly_spaced, permutation

_MULTIPLE = 32  # padded lengths are rounded up to this: fewer shapes, whole vectors
_PACKING_KEY = 0x9AC7  # another stream of random numbers than the order of the epochs
_MAX_NAMES = 3  # examples that a batch's name mentions


def pack(sizes: np.ndarray, T: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack examples of the given sizes (n,), each at most T, into rows of T: best-fit decreasing.

    Returns the indices of the examples, row by row (n,), and where each row begins (rows + 1,).
    Examples of equal size are taken in random order. Johnson (1973): at most 11/9 of the fewest
    possible rows, plus one.
    """
    sizes = sizes.astype(np.int64)
    order = permutation(len(sizes), seed, 0, _PACKING_KEY)
    order = order[np.argsort(-sizes[order], kind="stable")]
    left: list[list[int]] = [[] for _ in range(T + 1)]  # rows by their free positions
    occupied = 0  # bit r: some row has r free positions
    rows = 0
    row_of = np.empty(len(sizes), np.int64)
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fits = occupied >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1  # the lowest bit: the tightest row
            row = left[room].pop()
            if not left[room]:
                occupied ^= 1 << room
        else:
            room, row = T, rows
            rows += 1
        row_of[number] = row
        if room > size:
            left[room - size].append(row)
            occupied |= 1 << room - size
    starts = np.searchsorted(np.sort(row_of), np.arange(rows + 1))
    return np.argsort(row_of, kind="stable"), starts


def fill_batch(rows: Sequence[Sequence[Example]], width: int, pad_id: int, packed: bool) -> Batch:
    """Rows of `width`; packed: with the number of the document and the position in it."""
    inputs = np.full((len(rows), width), pad_id, np.int64)
    targets = np.full_like(inputs, IGNORE_INDEX)
    documents, positions = np.zeros_like(inputs), np.zeros_like(inputs)
    for b, members in enumerate(rows):
        at = 0
        for number, (ids, labels, _) in enumerate(members):
            end = at + len(ids) - 1
            inputs[b, at:end], targets[b, at:end] = ids[:-1], labels[1:]
            documents[b, at:end], positions[b, at:end] = number, np.arange(end - at)
            at = end
        documents[b, at:], positions[b, at:] = len(members), np.arange(width - at)
    names = [example.name for members in rows for example in members]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        documents=torch.from_numpy(documents) if packed else None,
        positions=torch.from_numpy(positions) if packed else None,
        name=", ".join(names[:_MAX_NAMES]) + more,
        tokens=sum(len(example.ids) - 1 for members in rows for example in members),
    )


def padded_width(longest: int, limit: int) -> int:
    """The width of rows that hold `longest` positions, at most limit."""
    return min(limit, -(-max(1, longest) // _MULTIPLE) * _MULTIPLE)


class _Rows(EpochOrder, ABC):
    """Batches of rows in the order of the epochs."""

    def __init__(self, examples: Examples, T: int, seed: int, pad_id: int) -> None:
        """ValueError naming an example of more than T + 1 tokens."""
        super().__init__(len(examples), seed)
        self.examples, self.T, self.pad_id = examples, T, pad_id
        if not len(examples):
            raise ValueError("no examples to train on")
        longest = int(np.argmax(examples.lengths))
        if examples.lengths[longest] > T + 1:
            raise ValueError(
                f"{examples[longest].name}: {examples.lengths[longest]} tokens do not fit into"
                f" rows of {T} and one target more: prepare the set for this context length"
            )

    @abstractmethod
    def _make_batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers."""

    def batch(self, first: int, count: int) -> Batch:
        """Rows first..first+count-1 of the endless sequence."""
        return self._make_batch([self.item(i) for i in range(first, first + count)])

    def validation(self, B: int, limit: int | None = None) -> Iterator[Batch]:
        """Every row once in fixed order; with a limit, rows of about that many tokens, spread
        evenly over the set. The last batch may have fewer than B rows."""
        n = self.per_epoch
        keep = n if limit is None else max(1, n * limit // self.examples.tokens)
        rows = evenly_spaced(n, keep)
        for at in range(0, len(rows), B):
            yield self._make_batch(rows[at : at + B])


class PackedRows(_Rows):
    """Several examples per row of T, each attending only to itself, with positions from 0.

    Which examples share a row is decided once; the order of rows is new in each epoch. The rest of
    a row is padding, as a document of its own. A mask that counts from the start of the row, such
    as prefix(n), would apply to the first example only: it needs PaddedRows.
    """

    def __init__(self, examples: Examples, T: int, seed: int, pad_id: int) -> None:
        super().__init__(examples, T, seed, pad_id)
        self._members, self._starts = pack(examples.lengths - 1, T, seed)
        self.per_epoch = len(self._starts) - 1

    @property
    def filled(self) -> float:
        """Share of the positions that hold a token."""
        return float((self.examples.lengths - 1).sum()) / (self.per_epoch * self.T)

    def _make_batch(self, rows: Sequence[int]) -> Batch:
        members = [self._members[self._starts[row] : self._starts[row + 1]] for row in rows]
        found = [[self.examples[int(number)] for number in numbers] for numbers in members]
        return fill_batch(found, self.T, self.pad_id, packed=True)


class PaddedRows(_Rows):
    """One example per row, padded on the right to the longest of its batch, or to T if `fixed`
    (a compiled graph is for one shape). A mask that looks ahead would attend to the padding.
    """

    def __init__(
        self, examples: Examples, T: int, seed: int, pad_id: int, *, fixed: bool = False
    ) -> None:
        super().__init__(examples, T, seed, pad_id)
        self.fixed = fixed

    def _make_batch(self, rows: Sequence[int]) -> Batch:
        found = [[self.examples[row]] for row in rows]
        longest = max(len(example.ids) - 1 for (example,) in found)
        width = self.T if self.fixed else padded_width(longest, self.T)
        return fill_batch(found, width, self.pad_id, packed=False)

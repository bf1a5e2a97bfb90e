"""The rows of a step in micro-batches, and which rank reads which."""

from __future__ import annotations

from gptsmith.batch import Batch
from gptsmith.recipes.plan import Dataset


def micro_batches(
    dataset: Dataset, first: int, count: int, batch_size: int, rank: int, ranks: int
) -> list[Batch]:
    """The share of `rank` in rows first..first+count-1, in micro-batches of batch_size.

    The micro-batches are the same for any number of ranks, which take turns. Where a rank has none
    left in the last turn, it computes the first one without targets: its gradient is zero.
    """
    starts = range(first, first + count, batch_size)
    found = []
    for turn in range(0, len(starts), ranks):
        number = turn + rank
        at = starts[number] if number < len(starts) else first
        batch = dataset.batch(at, min(batch_size, first + count - at))
        found.append(batch if number < len(starts) else batch.without_targets())
    return found

"""Dividing a set into training, validation and test, the same way at every reading.

Rows with equal keys form a group, which stays in one split: what a model should judge must not be
known to it from training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def group(keys: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of the rows of each key, keys in order of appearance."""
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups


def hash_order(keys: Sequence[str], seed: int) -> list[int]:
    """The keys' numbers, ordered by a hash of seed and key.

    It depends neither on the order of the keys nor on other keys, so that most keys of a file that
    grows stay in the split where they were.
    """
    digests = [hashlib.sha256(f"{seed}\n{key}".encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)


def fill(
    order: Iterable[int], room: Sequence[int], sizes: Sequence[int] | None = None
) -> list[list[int]]:
    """Divide numbered groups into splits of limited room and one more that takes the rest.

    Each group goes, in the given order, to the first split that has room for all of it.
    sizes: of the groups (default: 1 each). The numbers of each split are returned sorted.
    """
    left = list(room)
    splits: list[list[int]] = [[] for _ in (*room, None)]
    for number in order:
        size = 1 if sizes is None else sizes[number]
        into = next((i for i, free in enumerate(left) if size <= free), len(left))
        if into < len(left):
            left[into] -= size
        splits[into].append(number)
    return [sorted(split) for split in splits]

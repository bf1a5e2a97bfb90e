"""Prefix trees of token sequences, so that tokens which several texts share are processed once.

T nodes of a tree, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

Tokens = tuple[int, ...]  # of one text

MIN_PREFIX = 64  # tokens of a shared prefix that is read separately, and that this must save
MAX_NODES = 1024  # of one tree: attention within it is dense


class PrefixTree:
    """Texts after a shared prefix of `start` tokens, which is not part of the tree.

    ids, parents, positions: by node, parents before children; the parent of a root is -1.
    paths: the nodes of each text, root first.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self.paths: dict[Tokens, list[int]] = {}
        self._nodes: dict[tuple[int, int], int] = {}  # (parent, id) -> node

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, text: Tokens) -> None:
        path, node = [], -1
        for position in range(self.start, len(text)):
            key = node, text[position]
            if key not in self._nodes:
                self._nodes[key] = len(self.ids)
                self.ids.append(text[position])
                self.parents.append(node)
                self.positions.append(position)
            node = self._nodes[key]
            path.append(node)
        self.paths[text] = path

    def same_text(self) -> np.ndarray:
        """(T, T) bools: whether two nodes are on the path of one text."""
        ancestors = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                ancestors[node, :node] = ancestors[parent, :node]
        return ancestors | ancestors.T


class PrefixGroup(NamedTuple):
    """Trees whose texts all begin with `prefix`, which is processed once, before them."""

    prefix: Tokens
    trees: list[PrefixTree]


def plan(
    texts: Sequence[Tokens], tails: Sequence[int], C: int, lookahead: int
) -> list[PrefixGroup]:
    """Group the sorted `texts`. Outputs are needed at the last `tails[i]` tokens of each text.

    C: the model's width. lookahead: no text may branch before this position, because earlier
    tokens see the tokens up to there (`Mask.lookahead`).
    """
    groups: list[PrefixGroup] = []
    rest: list[Tokens] = []
    for _, run in groupby(range(len(texts)), key=lambda i: texts[i][:MIN_PREFIX]):
        numbers = list(run)
        members = [texts[i] for i in numbers]
        # Outputs are needed for tails, so those cannot be part of the prefix.
        limit = min(len(texts[i]) - tails[i] for i in numbers)
        length = min(common_prefix(members[0], members[-1]), limit)
        if length >= max(MIN_PREFIX, lookahead) and len(members) > 1:
            trees = _trees(members, length, C, lookahead)
            alone = count_nodes(_trees(members, 0, C, lookahead))
            if alone - count_nodes(trees) - length >= MIN_PREFIX:
                groups.append(PrefixGroup(members[0][:length], trees))
                continue
        rest += members
    if rest:
        groups.append(PrefixGroup((), _trees(rest, 0, C, lookahead)))
    return groups


def count_nodes(trees: Sequence[PrefixTree]) -> int:
    return sum(map(len, trees))


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _trees(texts: Sequence[Tokens], start: int, C: int, lookahead: int) -> list[PrefixTree]:
    """Sorted texts as trees; neighbours share a tree if that is less work.

    Not processing n tokens again saves 24 C^2 n operations per layer (12 C^2 weights); branches of
    a and b tokens in one dense attention cost 8 C a b.
    """
    trees: list[PrefixTree] = []
    for i, text in enumerate(texts):
        if trees:
            common = common_prefix(texts[i - 1], text)
            saved, new, old = common - start, len(text) - common, len(trees[-1])
            if common >= lookahead and 3 * C * saved > old * new and old + new <= MAX_NODES:
                trees[-1].add(text)
                continue
        trees.append(PrefixTree(start))
        trees[-1].add(text)
    return trees


def batches(trees: Sequence[PrefixTree], budget: int) -> Iterator[list[PrefixTree]]:
    """Trees of similar size, the largest first, up to `budget` tokens with their padding."""
    batch: list[PrefixTree] = []
    for tree in sorted(trees, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch

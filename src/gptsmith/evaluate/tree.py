"""Texts that begin alike as trees of tokens, and which of them are read together.

T tokens of a tree, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Text = tuple[int, ...]

STEM = 64  # a common beginning of so many tokens may be read apart, if it saves as many
LARGEST = 1024  # nodes of a tree: attention within it is dense


class Tree:
    """Texts behind a common stem of `start` tokens: each token they share is one node.

    ids, parents, positions: by node, parents before children, -1 for the parent of a root.
    paths: the nodes of each text, root first.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self.paths: dict[Text, list[int]] = {}
        self._nodes: dict[tuple[int, int], int] = {}  # (parent, id) -> node

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, text: Text) -> None:
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

    def related(self) -> np.ndarray:
        """Bools (T, T): whether two nodes lie on the path of one text."""
        above = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                above[node, :node] = above[parent, :node]
        return above | above.T


class Job(NamedTuple):
    """Trees to be read in batches, after the stem that they all have in common."""

    stem: Text
    trees: list[Tree]


def plan(texts: Sequence[Text], tails: Sequence[int], C: int, ahead: int) -> list[Job]:
    """How to read the sorted `texts`, of each of which the last `tails` tokens are looked at.

    C: the model's width. ahead: nothing may branch before this position, because tokens up to there
    are seen by earlier ones (`Mask.lookahead`).
    """
    jobs: list[Job] = []
    rest: list[Text] = []
    for run in _runs(texts):
        members = texts[run]
        # The tokens that are looked at stay behind the stem.
        own = min(len(text) - tail for text, tail in zip(members, tails[run], strict=True))
        stem = min(shared(members[0], members[-1]), own)
        if stem >= max(STEM, ahead) and len(members) > 1:
            behind = _trees(members, stem, C, ahead)
            if size(_trees(members, 0, C, ahead)) - size(behind) - stem >= STEM:
                jobs.append(Job(members[0][:stem], behind))
                continue
        rest += members
    if rest:
        jobs.append(Job((), _trees(rest, 0, C, ahead)))
    return jobs


def size(trees: Sequence[Tree]) -> int:
    """Nodes of all these trees."""
    return sum(map(len, trees))


def shared(a: Text, b: Text) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _runs(texts: Sequence[Text]) -> Iterator[slice]:
    """Neighbours that have STEM tokens in common."""
    start = 0
    for i in range(1, len(texts) + 1):
        if i == len(texts) or texts[i - 1][:STEM] != texts[i][:STEM]:
            yield slice(start, i)
            start = i


def _trees(texts: Sequence[Text], start: int, C: int, ahead: int) -> list[Tree]:
    """Neighbours share a tree where that is less work.

    n tokens that are not read again save 24 C^2 n operations in each layer (12 C^2 weights); parts
    of a and b tokens in one dense attention cost 8 C a b.
    """
    trees: list[Tree] = []
    for i, text in enumerate(texts):
        if trees:
            common = shared(texts[i - 1], text)
            saved, new, old = common - start, len(text) - common, len(trees[-1])
            if common >= ahead and 3 * C * saved > old * new and old + new <= LARGEST:
                trees[-1].add(text)
                continue
        trees.append(Tree(start))
        trees[-1].add(text)
    return trees


def batches(trees: Sequence[Tree], budget: int) -> Iterator[list[Tree]]:
    """Trees of about one size, the largest first, up to `budget` tokens with their padding."""
    batch: list[Tree] = []
    for tree in sorted(trees, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch

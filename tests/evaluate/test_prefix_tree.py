"""Prefix trees contain each shared token once, and every text."""

import random

import pytest

from gptsmith.evaluate.prefix_tree import (
    PrefixGroup,
    PrefixTree,
    Tokens,
    batches,
    count_nodes,
    plan,
)

C = 64
GENERATOR = random.Random()


@pytest.fixture(autouse=True)
def _seed() -> None:
    GENERATOR.seed(0)


def tokens(n: int) -> Tokens:
    return tuple(GENERATOR.randrange(50) for _ in range(n))


def texts_of(groups: list[PrefixGroup]) -> list[Tokens]:
    """The texts that the nodes of the trees spell."""
    found = []
    for group in groups:
        for one in group.trees:
            assert one.start == len(group.prefix)
            for text, path in one.paths.items():
                assert text == group.prefix + tuple(one.ids[node] for node in path)
                assert [one.positions[node] for node in path] == [*range(one.start, len(text))]
                assert [one.parents[node] for node in path] == [-1, *path[:-1]]
                found.append(text)
    return sorted(found)


def test_nodes_are_related_within_one_text_only() -> None:
    one = PrefixTree(0)
    for text in ((1, 2, 3), (1, 2, 4, 5), (1, 6)):
        one.add(text)
    assert one.ids == [1, 2, 3, 4, 5, 6]
    same_text = one.same_text()
    for a in range(6):
        for b in range(6):
            together = any(a in path and b in path for path in one.paths.values())
            assert same_text[a, b] == together


def test_choices_share_a_tree_and_unrelated_texts_do_not() -> None:
    context, endings = tokens(30), [tokens(12) for _ in range(4)]
    texts = sorted([*(context + ending for ending in endings), tokens(40)])
    (group,) = plan(texts, [5] * 5, C, 0)
    assert not group.prefix
    assert sorted(len(one.paths) for one in group.trees) == [1, 4]
    assert count_nodes(group.trees) <= 30 + 4 * 12 + 40
    assert texts_of([group]) == texts


def test_worked_examples_become_a_shared_prefix() -> None:
    """Two subjects, each with its own examples, and questions without any."""
    texts = sorted(
        [prefix + tokens(50) for prefix in (tokens(300), tokens(200)) for _ in range(20)]
        + [tokens(50) for _ in range(7)]
    )
    groups = plan(texts, [1] * len(texts), C, 0)
    assert sorted(len(group.prefix) for group in groups) == [0, 200, 300]
    assert sum(len(group.prefix) + count_nodes(group.trees) for group in groups) <= 500 + 47 * 50
    assert texts_of(groups) == texts


def test_target_positions_are_never_part_of_the_shared_prefix() -> None:
    shared = tokens(100)
    texts = sorted([shared, *(shared + tokens(n) for n in range(1, 60) for _ in range(6))])
    tails = [30 if text == shared else 1 for text in texts]
    groups = plan(texts, tails, C, 0)
    assert len(groups[0].prefix) == 70
    assert texts_of(groups) == texts


def test_no_branch_before_the_lookahead_of_the_mask() -> None:
    context = tokens(20)
    texts = sorted((*context, i, *tokens(30)) for i in range(4))
    assert len(plan(texts, [1] * 4, C, 20)[0].trees) == 1
    assert len(plan(texts, [1] * 4, C, 21)[0].trees) == 4
    prefix = tokens(90)
    texts = sorted((*prefix, i, *tokens(30)) for i in range(40))
    assert plan(texts, [1] * 40, C, 80)[0].prefix == prefix
    (group,) = plan(texts, [1] * 40, C, 91)
    assert not group.prefix
    assert len(group.trees) == 40


def test_no_texts_no_groups() -> None:
    assert plan([], [], C, 0) == []
    assert list(batches([], 100)) == []


def test_batches_contain_every_tree_within_the_budget() -> None:
    trees = []
    for n in (300, 5, 7, 90, 80, 85, 6, 6):
        trees.append(PrefixTree(0))
        trees[-1].add(tuple(range(n)))
    found = list(batches(trees, 200))
    assert [[len(one) for one in batch] for batch in found] == [
        [300], [90, 85], [80, 7], [6, 6, 5],
    ]  # fmt: skip

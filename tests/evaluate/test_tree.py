"""Trees hold each shared token once, and everything that was asked."""

import random

import pytest

from gptsmith.evaluate import tree
from gptsmith.evaluate.tree import Text, Tree, batches, plan, size

C = 64
GENERATOR = random.Random()


@pytest.fixture(autouse=True)
def _seed() -> None:
    GENERATOR.seed(0)


def tokens(n: int) -> Text:
    return tuple(GENERATOR.randrange(50) for _ in range(n))


def texts_of(jobs: list[tree.Job]) -> list[Text]:
    """What the trees spell, by their nodes."""
    found = []
    for job in jobs:
        for one in job.trees:
            assert one.start == len(job.stem)
            for text, path in one.paths.items():
                assert text == job.stem + tuple(one.ids[node] for node in path)
                assert [one.positions[node] for node in path] == [*range(one.start, len(text))]
                assert [one.parents[node] for node in path] == [-1, *path[:-1]]
                found.append(text)
    return sorted(found)


def test_nodes_see_their_own_text_only() -> None:
    one = Tree(0)
    for text in ((1, 2, 3), (1, 2, 4, 5), (1, 6)):
        one.add(text)
    assert one.ids == [1, 2, 3, 4, 5, 6]
    related = one.related()
    for a in range(6):
        for b in range(6):
            together = any(a in path and b in path for path in one.paths.values())
            assert related[a, b] == together


def test_a_question_is_one_tree_and_strangers_are_none() -> None:
    context, endings = tokens(30), [tokens(12) for _ in range(4)]
    texts = sorted([*(context + ending for ending in endings), tokens(40)])
    (job,) = plan(texts, [5] * 5, C, 0)
    assert not job.stem
    assert sorted(len(one.paths) for one in job.trees) == [1, 4]
    assert size(job.trees) <= 30 + 4 * 12 + 40
    assert texts_of([job]) == texts


def test_worked_examples_are_a_stem() -> None:
    """Two subjects, each with its own examples, and questions without any."""
    texts = sorted(
        [stem + tokens(50) for stem in (tokens(300), tokens(200)) for _ in range(20)]
        + [tokens(50) for _ in range(7)]
    )
    jobs = plan(texts, [1] * len(texts), C, 0)
    assert sorted(len(job.stem) for job in jobs) == [0, 200, 300]
    assert sum(len(job.stem) + size(job.trees) for job in jobs) <= 500 + 47 * 50
    assert texts_of(jobs) == texts


def test_what_is_looked_at_stays_behind_the_stem() -> None:
    shared = tokens(100)
    texts = sorted([shared, *(shared + tokens(n) for n in range(1, 60) for _ in range(6))])
    tails = [30 if text == shared else 1 for text in texts]
    jobs = plan(texts, tails, C, 0)
    assert len(jobs[0].stem) == 70
    assert texts_of(jobs) == texts


def test_nothing_branches_where_tokens_see_later_ones() -> None:
    context = tokens(20)
    texts = sorted((*context, i, *tokens(30)) for i in range(4))
    assert len(plan(texts, [1] * 4, C, 20)[0].trees) == 1
    assert len(plan(texts, [1] * 4, C, 21)[0].trees) == 4
    stem = tokens(90)
    texts = sorted((*stem, i, *tokens(30)) for i in range(40))
    assert plan(texts, [1] * 40, C, 80)[0].stem == stem
    (job,) = plan(texts, [1] * 40, C, 91)
    assert not job.stem
    assert len(job.trees) == 40


def test_no_text_is_no_job() -> None:
    assert plan([], [], C, 0) == []
    assert list(batches([], 100)) == []


def test_batches_hold_every_tree_within_the_budget() -> None:
    trees = []
    for n in (300, 5, 7, 90, 80, 85, 6, 6):
        trees.append(Tree(0))
        trees[-1].add(tuple(range(n)))
    found = list(batches(trees, 200))
    assert [[len(one) for one in batch] for batch in found] == [
        [300], [90, 85], [80, 7], [6, 6, 5],
    ]  # fmt: skip

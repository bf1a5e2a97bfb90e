"""Batches that a thread makes ahead are those that a step would make, in the same order."""

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from ranks import Rows, pretrain
from runs import assert_same_checkpoints

from gptsmith import cli
from gptsmith.batch import Batch
from gptsmith.data.dataset import Windows
from gptsmith.data.shards import Corpus
from gptsmith.recipes import loop
from gptsmith.recipes.plan import Dataset
from gptsmith.recipes.prefetch import Prefetch, step_batches
from gptsmith.train import distributed

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = torch.device("meta")  # stands for it: batches stay where they are


def equal(found: Sequence[Batch], expected: Sequence[Batch]) -> bool:
    return all(
        a.name == b.name
        and a.count == b.count
        and torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        for a, b in zip(found, expected, strict=True)
    )


def test_the_batches_of_a_corpus_come_in_the_same_order_over_epochs(corpus) -> None:
    opened = Corpus.open(corpus)
    windows = Windows(opened.train, 32, 3, opened.document)
    made = (step_batches(windows, 7 * 50, 50, torch.device(d)) for d in ("meta", "cpu"))
    steps = windows.per_epoch // 350 * 2  # into the second epoch
    assert steps > 8
    with next(made) as ahead, next(made) as inline:
        assert isinstance(ahead, Prefetch)
        assert not isinstance(inline, Prefetch)
        for step in range(steps):
            assert equal(ahead(step), inline(step))
            assert windows.position(step) == {"seed": 3, "epoch": step // windows.per_epoch,
                                              "index": step % windows.per_epoch,
                                              "per_epoch": windows.per_epoch}  # fmt: skip


def test_training_does_not_change(corpus, tmp_path, monkeypatch) -> None:
    words = ["--train.total-batch-tokens", "128", "--train.steps", "6", "--eval.interval", "0"]
    assert cli.main(pretrain(corpus, tmp_path / "inline", *words)) == 0
    made = []

    @contextmanager
    def always(dataset: Dataset, rows: int, size: int, device: torch.device, end: int | None):
        with step_batches(dataset, rows, size, GPU, end) as ahead:
            made.append(ahead)
            yield ahead

    monkeypatch.setattr(loop, "step_batches", always)
    assert cli.main(pretrain(corpus, tmp_path / "ahead", *words)) == 0
    assert [type(each) for each in made] == [Prefetch]
    assert made[0]._step == 5, "nothing is made for a step that does not come"
    made[0]._thread._thread.join(60)  # it ends with the training
    assert not made[0]._thread._thread.is_alive()
    assert_same_checkpoints(tmp_path / "ahead", tmp_path / "inline")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_share_of_rank_0_is_the_same_while_it_is_alone(monkeypatch, device) -> None:
    """The thread makes a step's batches whenever it comes to it, also during an evaluation."""
    launch = distributed.Launch(0, 2, 0, "localhost", 1)
    monkeypatch.setattr(distributed, "_connection", distributed._Connection(launch, None, None))
    with step_batches(Rows(), 8, 2, torch.device(device)) as batches, distributed.alone():
        found = batches(1)
    assert equal(found, [Rows().batch(8, 2), Rows().batch(12, 2)])


def test_a_step_may_be_asked_for_twice_and_the_order_left() -> None:
    made = []

    def make(step: int) -> list[Batch]:
        made.append((step, threading.current_thread() is threading.main_thread()))
        return [Rows().batch(step, 2)]

    ahead = Prefetch(make, GPU)
    for step in (4, 4, 5, 6, 0):  # several ranks begin with their first step twice
        assert equal(ahead(step), [Rows().batch(step, 2)])
    ahead._batches.result()
    assert [step for step, _ in made] == [4, 5, 4, 5, 6, 7, 0, 1]
    assert not any(main for _, main in made)


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    begun = [threading.Event() for _ in range(4)]

    def make(step: int) -> list[Batch]:
        begun[step].set()
        return []

    ahead = Prefetch(make, GPU)
    for _, then in pairwise(range(4)):
        ahead(then - 1)
        assert begun[then].wait(60)


def test_an_error_is_raised_for_its_own_step() -> None:
    def make(step: int) -> list[Batch]:
        if step == 2:
            raise ValueError("shard 3 is damaged")
        return []

    ahead = Prefetch(make, GPU)
    assert [ahead(0), ahead(1)] == [[], []]
    for _ in range(2):
        with pytest.raises(ValueError, match="shard 3 is damaged"):
            ahead(2)

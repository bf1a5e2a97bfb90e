"""Make the batches of the next step while a GPU computes this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from gptsmith.batch import Batch
from gptsmith.recipes.micro_batches import micro_batches
from gptsmith.recipes.plan import Dataset
from gptsmith.train import distributed
from gptsmith.train.worker import Worker, result

Batches = Callable[[int], Sequence[Batch]]  # of a step


@contextmanager
def step_batches(
    dataset: Dataset,
    rows_per_step: int,
    batch_size: int,
    device: torch.device,
    end: int | None = None,
) -> Iterator[Batches]:
    """step -> this rank's micro-batches. They are made ahead, before step `end`, unless the CPU
    computes the step, from which the thread would take its time."""
    # asked now: in the thread, rank 0 may just be `distributed.alone()`
    rank, ranks = distributed.rank(), distributed.world_size()

    def make(step: int) -> Sequence[Batch]:
        first = step * rows_per_step
        return micro_batches(dataset, first, rows_per_step, batch_size, rank, ranks)

    if device.type == "cpu":
        yield make
        return
    ahead = Prefetch(make, device, end)
    try:
        yield ahead
    finally:
        ahead.close()


class Prefetch:
    """step -> the batches that `make` gives, which is called in a thread of its own, for the step
    that is asked for and then for the one after it. What it raises is raised for that step.

    device: of the model; for CUDA, batches are put into pinned memory, from which they are copied
    while the GPU computes. end: the first step that is not made ahead (None: there is no end).
    """

    def __init__(self, make: Batches, device: torch.device, end: int | None = None) -> None:
        self._make, self._end = make, end
        self._gpu = torch.cuda.current_device() if device.type == "cuda" else None
        self._thread = Worker("batches")
        self._step: int | None = None
        self._batches: Future[list[Batch]]

    def __call__(self, step: int) -> Sequence[Batch]:
        if step != self._step:
            self._begin(step)
        batches = result(self._batches)
        if self._end is None or step + 1 < self._end:
            self._begin(step + 1)
        return batches

    def close(self) -> None:
        self._thread.close()

    def _begin(self, step: int) -> None:
        self._step, self._batches = step, self._thread.submit(lambda: self._batches_of(step))

    def _batches_of(self, step: int) -> list[Batch]:
        if self._gpu is None:
            return [*self._make(step)]
        torch.cuda.set_device(self._gpu)  # a thread begins with GPU 0: pinning would make a context
        return [batch.pinned() for batch in self._make(step)]

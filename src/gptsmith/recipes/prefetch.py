"""Make the batches of the next step while a GPU computes this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from gptsmith.batch import Batch
from gptsmith.recipes.micro_batches import micro_batches
from gptsmith.recipes.plan import Dataset
from gptsmith.train import distributed

Batches = Callable[[int], Sequence[Batch]]  # of a step


def step_batches(
    dataset: Dataset, rows_per_step: int, batch_size: int, device: torch.device
) -> Batches:
    """step -> this rank's micro-batches. They are made ahead unless the CPU computes the step, from
    which the thread would take its time."""
    # asked now: in the thread, rank 0 may just be `distributed.alone()`
    rank, ranks = distributed.rank(), distributed.world_size()

    def make(step: int) -> Sequence[Batch]:
        first = step * rows_per_step
        return micro_batches(dataset, first, rows_per_step, batch_size, rank, ranks)

    return make if device.type == "cpu" else Prefetch(make, device)


class Prefetch:
    """step -> the batches that `make` gives, which is called in a thread of its own, for the step
    that is asked for and then for the one after it. What it raises is raised for that step.

    device: of the model; for CUDA, batches are put into pinned memory, from which they are copied
    while the GPU computes.
    """

    def __init__(self, make: Batches, device: torch.device) -> None:
        self._make, self._pins = make, device.type == "cuda"
        # a thread begins with GPU 0, and pinning memory would make a context on it
        index = torch.cuda.current_device() if self._pins else 0
        prepare = partial(torch.cuda.set_device, index) if self._pins else None
        self._thread = ThreadPoolExecutor(1, "batches", initializer=prepare)
        self._step: int | None = None
        self._batches: Future[list[Batch]]

    def __call__(self, step: int) -> Sequence[Batch]:
        if step != self._step:
            self._begin(step)
        batches = self._batches.result()
        self._begin(step + 1)
        return batches

    def _begin(self, step: int) -> None:
        self._step, self._batches = step, self._thread.submit(self._batches_of, step)

    def _batches_of(self, step: int) -> list[Batch]:
        return [batch.pinned() if self._pins else batch for batch in self._make(step)]

"""Write checkpoints while training goes on, which stops only until the tensors are copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from gptsmith.train.worker import Worker, result


class HostMemory:
    """Copies of tensors on the CPU, by name; each takes the memory of the copy before it."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def empty(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False
    ) -> Tensor:
        """Memory for a tensor. pinned: not swapped, which a GPU can write to at full speed."""
        found = self._tensors.get(name)
        if found is None or (found.shape, found.dtype) != (torch.Size(shape), dtype):
            found = torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
            self._tensors[name] = found
        return found

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies that stay as they are when the tensors change."""
        copies = {}
        for name, x in tensors.items():
            copies[name] = self.empty(name, x.shape, x.dtype, pinned=x.is_cuda)
            copies[name].copy_(x.detach(), non_blocking=x.is_cuda)
        for device in {x.device for x in tensors.values() if x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies


class CheckpointWriter:
    """Executes one save at a time, in a thread of its own.

    A context manager that ends when the last save has ended, but at once on KeyboardInterrupt (see
    StopSignal): a save under way is abandoned then, which leaves the checkpoint before it. What a
    save raises is raised by the next `check`, `wait` or `start`, or at the end, where it becomes a
    note of an exception that leaves the block. memory: for the copies that a save writes; None if
    saves are to be executed at once, without a thread: then they need no copies.
    """

    def __init__(self, background: bool) -> None:
        self.memory = HostMemory() if background else None
        self._thread = Worker("checkpoint") if background else None
        self._save: Future[None] | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Execute `save`, after the one before."""
        self.wait()
        if self._thread is None:
            save()
        else:
            self._save = self._thread.submit(save)

    def check(self) -> None:
        """Raise what a save that has ended has raised."""
        if self._save is not None and self._save.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save has ended; its copies may be overwritten then."""
        save = self._save
        if save is None:
            return
        try:
            result(save)
        finally:
            if save.done():  # else this was interrupted
                self._save = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if not isinstance(error, KeyboardInterrupt):
                self.wait()
            elif self._save is not None and not self._save.done():
                error.add_note("the checkpoint being written is abandoned, the one before it stays")
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"the last checkpoint was not written: {failure}")
        finally:
            if self._thread is not None:
                self._thread.close()

"""Progress of long work: a bar on a terminal; elsewhere a line every few seconds, and the last."""

import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

import rich.progress

from gptsmith.console import Console

_LINE_SECONDS = 5.0

Step = TypeVar("Step")


class WorkProgress:
    """A context manager for work of `total` units (0: unknown), reported on standard error.

    percent: lines give the share that is done instead of the number of units.
    """

    def __init__(self, title: str, total: int, *, percent: bool = False) -> None:
        self.title, self.total, self.percent = title, total, percent
        self.started = self._shown_at = time.monotonic()
        self._console = Console(stderr=True)
        self._line = self._shown = ""
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[status]}", markup=False),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total or None, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if kind is None and self._shown != self._line and self._shown:
            self._show()

    def update(self, done: int, status: str = "") -> None:
        """done: units so far. status: what else is known, at the end of the line."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, status=status)
            return
        if self.percent:
            amount = f"{min(1.0, done / self.total):.0%}" if self.total else ""
        else:
            amount = f"{done:,} of {self.total:,}"
        self._line = f"{self.title}: {', '.join(part for part in (amount, status) if part)}"
        if time.monotonic() - self._shown_at >= _LINE_SECONDS:
            self._show()

    def _show(self) -> None:
        self._shown, self._shown_at = self._line, time.monotonic()
        self._console.print(self._line, soft_wrap=True)


def progress(steps: Iterable[Step], title: str, total: int) -> Iterator[Step]:
    """Iterate over the steps and report how many of `total` are done."""
    with WorkProgress(title, total) as shown:
        for done, step in enumerate(steps, 1):
            yield step
            shown.update(done)

"""Progress of long work: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Self, SupportsFloat, TypeVar

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from gptsmith.console import Console

_LINE_SECONDS = 5.0

Step = TypeVar("Step")


class WorkProgress:
    """A context manager for work of `total` units (0: unknown), reported on standard error.

    percent: lines give the share that is done instead of the number of units. quiet: show nothing.
    """

    def __init__(
        self, title: str, total: int, *, percent: bool = False, quiet: bool = False
    ) -> None:
        self.title, self.total, self.percent, self.quiet = title, total, percent, quiet
        self.started = self._shown_at = time.monotonic()
        self._console = Console(stderr=True)
        self._line = self._shown = ""
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
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
        if self.quiet:
            return
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


class ProgressLine:
    """Progress of training. On a terminal it draws within `show`: a refresh thread would take time
    from training.

    total_steps: None if unknown. interval: seconds between lines without a terminal.
    """

    def __init__(self, console: Console, total_steps: int | None, interval: float) -> None:
        self.console, self.total_steps = console, total_steps
        self.interval = 0.25 if console.is_terminal else interval
        self._shown: deque[tuple[float, int]] = deque(maxlen=40)  # (time, step)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def show(
        self,
        step: int,
        value: SupportsFloat,
        name: str = "loss",
        *,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Show the first and the last step, and others if `interval` has passed.

        Cheap to call at each step: `value`, a tensor, is read from the device when it is shown.
        mfu: a fraction (0.54).
        """
        now = time.perf_counter()
        if self._shown and now - self._shown[-1][0] < self.interval and step != self.total_steps:
            return
        self._shown.append((now, step))  # from the end of step 1, after compilation
        parts = [f"{name} {float(value):.4f}"]
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        (t0, s0), (t1, s1) = self._shown[0], self._shown[-1]
        if self.total_steps is not None and s0 < s1 < self.total_steps and t0 < t1:
            left = (self.total_steps - step) * (t1 - t0) / (s1 - s0)
            parts.append(f"{timedelta(seconds=round(left))} left")
        status = " · ".join(parts)
        if self.console.is_terminal:
            self._show_bar(step, status)
        else:
            total = "" if self.total_steps is None else f"/{self.total_steps:,}"
            self.print(f"step {step:,}{total} · {status}")

    def print(self, text: str) -> None:
        """Print a line of plain text, above the bar if there is one."""
        self.console.print(text, soft_wrap=True)

    def stop(self) -> None:
        """Stop the bar and restore the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _show_bar(self, step: int, status: str) -> None:
        if self._bar is None:
            total = "" if self.total_steps is None else "/{task.total:,}"
            self._bar = Progress(
                TextColumn(f"step {{task.completed:,}}{total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),  # piped output stays in the pipe
                expand=True,
            )
            self._task = self._bar.add_task("", total=self.total_steps, status="")
            self._bar.start()
        self._bar.update(self._task, completed=step, status=status, refresh=True)

"""Where a run is, for people: a live bar on a terminal, elsewhere a line every few seconds."""

import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor


class ProgressLine:
    """Draws itself within `show`: a refreshing thread would take time from training.

    total_steps: None when unknown. every: seconds between lines where there is no terminal.
    """

    def __init__(self, console: Console, total_steps: int | None, every: float) -> None:
        self.console, self.total_steps = console, total_steps
        self.every = 0.25 if console.is_terminal else every
        self._shown = time.perf_counter()
        self._past: deque[tuple[float, int]] = deque(maxlen=40)  # (time, step) of what was shown
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def show(
        self,
        step: int,
        *,
        loss: float | Tensor,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Cheap at each step: `loss` is read from the device only when it is shown. The first and
        the last of total_steps always are. `mfu` is a share (0.54)."""
        now = time.perf_counter()
        if self._past and now - self._shown < self.every and step != self.total_steps:
            return
        self._shown = now
        self._past.append((now, step))  # from the first step's end, when compilation is over
        parts = [f"loss {float(loss):.4f}"]
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        if left := self._left(step):
            parts.append(f"{_clock(left)} left")
        status = " · ".join(parts)
        if self.console.is_terminal:
            self._show_bar(step, status)
        else:
            of = "" if self.total_steps is None else f"/{self.total_steps:,}"
            self.say(f"step {step:,}{of} · {status}")

    def say(self, text: str) -> None:
        """A line of plain text, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> float | None:
        """Seconds to the end at the speed of the last steps shown."""
        (t0, s0), (t1, s1) = self._past[0], self._past[-1]
        if self.total_steps is None or s1 <= s0 or t1 <= t0:
            return None
        return (self.total_steps - step) * (t1 - t0) / (s1 - s0)

    def _show_bar(self, step: int, status: str) -> None:
        if self._bar is None:
            of = "" if self.total_steps is None else "/{task.total:,}"
            self._bar = Progress(
                TextColumn(f"step {{task.completed:,}}{of}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),  # a pipe behind stdout keeps what is printed
                expand=True,
            )
            self._task = self._bar.add_task("", total=self.total_steps, status="")
            self._bar.start()
        self._bar.update(self._task, completed=step, status=status, refresh=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""How far `prepare` has come: a bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 5.0


class PrepareProgress:
    """Use as a context; `total` is the number of source bytes, 0 where that is not known."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.console = Console(stderr=True, highlight=False)
        self.started = self._last = time.monotonic()
        self._before: int | None = None
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[what]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total or None, what="")

    def __enter__(self) -> "PrepareProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, position: int, text_bytes: int, tokens: int) -> None:
        """position: source bytes read; text_bytes and tokens: written in all."""
        now = time.monotonic()
        if self._before is None:
            self._before = text_bytes  # what an interrupted run had done is not our speed
        speed = (text_bytes - self._before) / 1e6 / max(now - self.started, 1e-6)
        what = f"{tokens:,} tokens, {text_bytes / 1e6:,.0f} MB, {speed:.1f} MB/s"
        self._bar.update(self._task, completed=position, what=what)
        if not self.console.is_terminal and now - self._last >= _PLAIN_SECONDS:
            self._last = now
            done = f"{min(1.0, position / self.total):.0%}, " if self.total else ""
            self.console.print(f"preparing: {done}{what}")

"""The progress of `prepare`: a bar on a terminal, elsewhere a line every few seconds."""

import time
from typing import Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptsmith.console import Console

_LINE_SECONDS = 5.0


class PrepareProgress:
    """A context manager; `total` is the number of source bytes, 0 where that is unknown."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.console = Console(stderr=True)
        self.started = self._shown = time.monotonic()
        self._resumed_at: int | None = None  # text bytes that an interrupted run had written
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total or None, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, position: int, text_bytes: int, tokens: int) -> None:
        """position: source bytes read; text_bytes and tokens: written in total."""
        now = time.monotonic()
        if self._resumed_at is None:
            self._resumed_at = text_bytes
        speed = (text_bytes - self._resumed_at) / 1e6 / max(now - self.started, 1e-6)
        status = f"{tokens:,} tokens, {text_bytes / 1e6:,.0f} MB, {speed:.1f} MB/s"
        self._bar.update(self._task, completed=position, status=status)
        if not self.console.is_terminal and now - self._shown >= _LINE_SECONDS:
            self._shown = now
            done = f"{min(1.0, position / self.total):.0%}, " if self.total else ""
            self.console.print(f"preparing: {done}{status}", soft_wrap=True)

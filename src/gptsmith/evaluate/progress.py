"""Progress of an evaluation: a bar on a terminal, a plain line every 10 s elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.markup import escape
from rich.progress import track

from gptsmith.console import Console

_PLAIN_SECONDS = 10.0

Step = TypeVar("Step")


def progress(steps: Iterable[Step], title: str, total: int) -> Iterator[Step]:
    """Iterate over the steps, and report on stderr how many of `total` are done."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(steps, escape(title), total=total, console=console, transient=True)
        return
    last = time.monotonic()
    for done, step in enumerate(steps, 1):
        yield step
        if time.monotonic() - last >= _PLAIN_SECONDS:
            last = time.monotonic()
            console.print(f"{title}: {done:,} of {total:,}", soft_wrap=True)

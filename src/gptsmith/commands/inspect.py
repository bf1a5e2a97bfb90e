"""`gptsmith inspect PATH`: what a corpus or a run holds."""

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from gptsmith import settings


class InspectOptions(BaseModel):
    """What to look at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    """A prepared corpus or a run folder."""
    top: int = Field(20, ge=1)
    """How many of the most frequent tokens of a corpus."""
    png: Path | None = None
    """Also draw document lengths and token frequencies of a corpus into this file."""


def main(argv: list[str]) -> None:
    options = settings.load(
        InspectOptions,
        argv,
        prog="gptsmith inspect",
        description="Show what a corpus or a run holds.",
        positional="path",
    )
    from rich.console import Console

    from gptsmith.data import inspect
    from gptsmith.data.statistics import CorpusReport

    report = inspect.inspect(options.path, Console(stderr=True))
    if options.png is not None:
        if not isinstance(report, CorpusReport):
            raise ValueError(f"--png draws a corpus, and {options.path} is a run: see curves.png")
        inspect.draw(report, options.png)
    # rich takes 80 columns where there is no terminal; in a file the tables may have their width
    inspect.show(report, Console(width=None if sys.stdout.isatty() else 120), options.top)

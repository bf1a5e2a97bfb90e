"""`gptsmith inspect PATH`: what a corpus, a run or a chat set holds."""

import sys
from pathlib import Path

from pydantic import Field
from rich.console import Console

from gptsmith.chat_template import chat_tokenizer
from gptsmith.config import load_config
from gptsmith.data import inspect
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport
from gptsmith.data.statistics import CorpusReport
from gptsmith.run import Run


class InspectOptions(ChatFiles):
    """What to look at."""

    path: Path
    """A prepared corpus, a run folder, or a file or folder of conversations."""
    top: int = Field(20, ge=1)
    """How many of the most frequent tokens of a corpus."""
    png: Path | None = None
    """Also draw document lengths and token frequencies of a corpus into this file."""
    tokenizer: Path | None = None
    """Conversations: the run that is to be tuned, for its tokenizer and template."""
    context_length: int | None = Field(None, ge=2)
    """Conversations: tokens of a row (default: the run's context)."""


def main(argv: list[str]) -> None:
    options = load_config(
        InspectOptions,
        argv,
        prog="gptsmith inspect",
        description="Show what a corpus, a run or a chat set holds.",
        positional="path",
    )
    # rich takes 80 columns where there is no terminal; in a file the tables may have their width
    out = Console(width=None if sys.stdout.isatty() else 120)
    if options.tokenizer is not None:
        return _chat(options, options.tokenizer, out)
    if options.path.is_file():
        raise ValueError(
            f"{options.path} is a file: to see conversations say --tokenizer RUN, the run that is "
            "to be tuned; of a run or a corpus give the folder"
        )
    report = inspect.inspect(options.path, Console(stderr=True))
    if options.png is not None:
        if not isinstance(report, CorpusReport):
            raise ValueError(f"--png draws a corpus, and {options.path} is a run: see curves.png")
        inspect.draw(report, options.png)
    inspect.show(report, out, options.top)


def _chat(options: InspectOptions, folder: Path, out: Console) -> None:
    from gptsmith.data import chat_inspect

    run = Run.open(folder)
    tokenizer, template = chat_tokenizer(run.tokenizer, run.template)
    report = chat_inspect.chat_report(
        [options.path], template, tokenizer,
        options.context_length or run.model_config.context_length,
        report=ReadReport(options.on_error), columns=options.columns(), labels=options.labels,
    )  # fmt: skip
    chat_inspect.show(report, out)

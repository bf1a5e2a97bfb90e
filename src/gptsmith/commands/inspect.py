"""`gptsmith inspect PATH`: show a prepared corpus, a run, or a chat data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from gptsmith.config import load_config
from gptsmith.data.options import ChatFiles
from gptsmith.recognize import is_corpus

if TYPE_CHECKING:
    from gptsmith.console import Console


class InspectOptions(ChatFiles):
    """Show a prepared corpus, a run, or a chat data set."""

    path: Path
    """A prepared corpus, a run folder, or a file or folder of conversations."""
    top: int = Field(20, ge=1)
    """Corpus: how many of the most frequent tokens to list."""
    png: Path | None = None
    """Corpus: also draw document lengths and token frequencies into this file."""
    tokenizer: Path | None = None
    """Conversations: the run to be fine-tuned, whose tokenizer and chat template are used."""
    context_length: int | None = Field(None, ge=2)
    """Conversations: tokens per row (default: the run's context)."""


def main(argv: list[str]) -> None:
    options = load_config(InspectOptions, argv, prog="gptsmith inspect", positional="path")
    if options.tokenizer is None and options.path.is_file():
        raise ValueError(
            f"{options.path} is a file: to inspect conversations, give --tokenizer RUN, the run "
            "to fine-tune on them; to inspect a run or a corpus, give its folder"
        )

    from gptsmith.console import Console

    out = Console()
    if options.tokenizer is not None:
        _chat(options, options.tokenizer, out)
    elif is_corpus(options.path):
        _corpus(options, out)
    else:
        _run(options, out)


def _corpus(options: InspectOptions, out: Console) -> None:
    from gptsmith.inspect import corpus, statistics

    report = statistics.corpus_report(options.path)
    if options.png is not None:
        corpus.draw_corpus(report, options.png)
    corpus.show_corpus(report, out, options.top)


def _run(options: InspectOptions, out: Console) -> None:
    from gptsmith.inspect.run import show_run
    from gptsmith.run import Run

    run = Run.open(options.path)
    if options.png is not None:
        raise ValueError(f"--png draws a corpus, and {options.path} is a run: see its curves.png")
    show_run(run, out)


def _chat(options: InspectOptions, folder: Path, out: Console) -> None:
    from gptsmith.chat_template.template import tuning_template
    from gptsmith.inspect import chat
    from gptsmith.recipes.finetune import max_length
    from gptsmith.run import Run

    run = Run.open(folder)
    template = tuning_template(run.tokenizer, run.template)
    T = max_length(options.context_length, run.model_config)
    report = chat.chat_report([options.path], options, template, T)
    chat.show_chat(report, out)

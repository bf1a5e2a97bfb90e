"""`gptsmith inspect PATH`: show a prepared corpus, a run, a chat data set, or preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from gptsmith.config import load_config
from gptsmith.data.options import ChatFiles, PreferenceFiles
from gptsmith.recognize import is_corpus

if TYPE_CHECKING:
    from gptsmith.console import Console


class InspectOptions(ChatFiles, PreferenceFiles):
    """Show a prepared corpus, a run, a chat data set, or preferences."""

    path: Path
    """A prepared corpus, a run folder, or a file or folder of conversations or preferences."""
    top: int = Field(20, ge=1)
    """Corpus: how many of the most frequent tokens to list."""
    png: Path | None = None
    """Corpus: also draw document lengths and token frequencies into this file."""
    tokenizer: Path | None = None
    """Conversations: the run to be fine-tuned, whose tokenizer and chat template are used."""
    context_length: int | None = Field(None, ge=2)
    """Conversations: tokens per row (default: the run's context)."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        # of preferences, the column of the questions may be named alone
        return self if self.chosen_column is not None else self.check_columns()


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
    from gptsmith.data.preferences import holds_preferences
    from gptsmith.inspect import chat, preference
    from gptsmith.recipes.finetune import max_length
    from gptsmith.run import Run

    run = Run.open(folder)
    template = tuning_template(run.tokenizer, run.template)
    T = max_length(options.context_length, run.model_config)
    sources = [options.path]
    as_chat = options.messages_column is not None or options.response_column is not None
    if not as_chat and holds_preferences(options.path, options):
        pairs = preference.preference_report(sources, options, template, T)
        preference.show_preferences(pairs, out)
        return
    chat.show_chat(chat.chat_report(sources, options, template, T), out)

"""`gptsmith prepare SOURCE... --out data/NAME`: text to a tokenizer and token shards.

With `--format chat --tokenizer RUN --out NAME.arrow`: conversations to token ids and labels, for
`gptsmith finetune chat`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gptsmith import terminal
from gptsmith.config import load_config
from gptsmith.data.options import ChatFiles, PrepareConfig


class PrepareChatConfig(ChatFiles):
    """Turn conversations into a memory-mapped file of token ids and labels."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Files, folders or patterns of conversations (.jsonl, .parquet, .arrow ...)."""
    out: Path
    """The file to write, NAME.arrow."""
    tokenizer: Path
    """Run to be fine-tuned: its tokenizer, its chat template if it has one, its context."""
    context_length: int | None = Field(None, ge=2)
    """Tokens per window of a conversation (default: the run's context, which is the most)."""
    overwrite: bool = False
    """Replace the file if it exists."""


def main(argv: list[str]) -> None:
    form, argv = _format(argv)
    if form == "text":
        _prepare_text(argv)
    elif form == "chat":
        _prepare_chat(argv)
    else:
        raise ValueError(f"--format {form}: expected text (the default) or chat")


def _prepare_text(argv: list[str]) -> None:
    config = load_config(PrepareConfig, argv, prog="gptsmith prepare", positional="sources")
    from gptsmith.data.prepare import prepare

    path = prepare(config)
    if config.task is not None:
        terminal.say("next, when all tasks have ended: the same command with --join for --task")
        return
    terminal.say(f"next: gptsmith inspect {path}")
    terminal.say(f"      gptsmith plan --data {path}")
    terminal.say(f"      gptsmith pretrain --data {path} --out runs/{path.absolute().name}")


def _prepare_chat(argv: list[str]) -> None:
    config = load_config(
        PrepareChatConfig, argv, prog="gptsmith prepare --format chat", positional="sources"
    )
    from gptsmith.chat_template.template import tuning_template
    from gptsmith.data.chat import write_chat
    from gptsmith.recipes.finetune import max_length
    from gptsmith.run import Run

    run = Run.open(config.tokenizer)
    template = tuning_template(run.tokenizer, run.template)
    T = max_length(config.context_length, run.model_config)
    counts = write_chat(config.sources, config, template, T, config.out, overwrite=config.overwrite)
    terminal.say(f"{config.out}: {counts}")
    terminal.say(
        f"next: gptsmith finetune chat --from {config.tokenizer} --data {config.out} --out RUN2"
    )


def _format(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --format, which decides the other options, and the remaining arguments."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    for i, word in enumerate(flags):
        if word.startswith("--format="):
            return word.removeprefix("--format="), argv[:i] + argv[i + 1 :]
        if word == "--format" and i + 1 < len(flags):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return "text", argv

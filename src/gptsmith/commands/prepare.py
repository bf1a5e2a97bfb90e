"""`gptsmith prepare SOURCE... --out data/NAME`: text to tokenizer and token shards, or
conversations to a file of token ids and labels (`--format chat`)."""

from pathlib import Path

from pydantic import Field

from gptsmith import settings
from gptsmith.conversation import chat_tokenizer
from gptsmith.data.chat import ChatFiles, write_chat
from gptsmith.data.prepare import PrepareConfig, prepare
from gptsmith.run import Run


def main(argv: list[str]) -> None:
    form, argv = _format(argv)
    if form == "chat":
        return _chat(argv)
    if form != "text":
        raise ValueError(f"--format {form}: there are text (the default) and chat")
    config = settings.load(
        PrepareConfig,
        argv,
        prog="gptsmith prepare",
        description="Turn text into a tokenizer and token shards. `--format chat` turns "
        "conversations into token ids and labels instead, with options of its own.",
        positional="sources",
    )
    path = prepare(config)
    print(f"next: gptsmith inspect {path}")
    print(f"      gptsmith pretrain --data {path} --out runs/{path.name}")


def _format(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --format, and the other words."""
    for i, word in enumerate(argv):
        if word.startswith("--format="):
            return word.removeprefix("--format="), argv[:i] + argv[i + 1 :]
        if word == "--format" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return "text", argv


class PrepareChatConfig(ChatFiles):
    """Conversations, the run that they are for, and where to."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Files, folders or patterns of conversations (.jsonl, .parquet, .arrow ...)."""
    out: Path
    """The file to write, NAME.arrow."""
    tokenizer: Path
    """Run that will be tuned: its tokenizer, its chat template if it has one, its context."""
    context_length: int | None = Field(None, ge=2)
    """Longest conversation in tokens (default: the run's context)."""
    overwrite: bool = False
    """Replace the file if it is there."""


def _chat(argv: list[str]) -> None:
    config = settings.load(
        PrepareChatConfig,
        argv,
        prog="gptsmith prepare --format chat",
        description="Turn conversations into token ids and labels, in a file that is mapped.",
        positional="sources",
    )
    run = Run.open(config.tokenizer)
    tokenizer, template = chat_tokenizer(run.tokenizer, run.template)
    reader = config.reader()
    counts = write_chat(
        config.sources, template, tokenizer,
        config.context_length or run.model_config.context_length, config.out,
        reader=reader, columns=config.columns(), labels=config.labels, overwrite=config.overwrite,
    )  # fmt: skip
    for kind, places in reader.left_out.items():
        print(f"left out: {len(places):,} x {kind}")
    print(f"{config.out}: {counts}")
    print(f"next: gptsmith finetune chat --from {config.tokenizer} --data {config.out} --out RUN2")

"""`gptsmith prepare SOURCE... --format chat --tokenizer RUN --out NAME.arrow`: conversations to
token ids and labels, for `finetune chat`."""

from pathlib import Path

from pydantic import Field

from gptsmith.chat_template import chat_tokenizer
from gptsmith.config import load_config
from gptsmith.data.chat import write_chat
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport
from gptsmith.run import Run


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


def main(argv: list[str]) -> None:
    config = load_config(
        PrepareChatConfig,
        argv,
        prog="gptsmith prepare --format chat",
        description="Turn conversations into token ids and labels, in a file that is mapped.",
        positional="sources",
    )
    run = Run.open(config.tokenizer)
    tokenizer, template = chat_tokenizer(run.tokenizer, run.template)
    counts = write_chat(
        config.sources, template, tokenizer,
        config.context_length or run.model_config.context_length, config.out,
        report=ReadReport(config.on_error), columns=config.columns(), labels=config.labels,
        overwrite=config.overwrite,
    )  # fmt: skip
    print(f"{config.out}: {counts}")
    print(f"next: gptsmith finetune chat --from {config.tokenizer} --data {config.out} --out RUN2")

"""`gptsmith prepare SOURCE... --out data/NAME`: text to tokenizer and token shards, or
conversations to a file of token ids and labels (`--format chat`)."""

from gptsmith.config import load_config
from gptsmith.data.prepare import PrepareConfig, prepare


def main(argv: list[str]) -> None:
    form, argv = _format(argv)
    if form == "chat":
        from gptsmith.commands import prepare_chat  # imports torch, which takes seconds

        return prepare_chat.main(argv)
    if form != "text":
        raise ValueError(f"--format {form}: there are text (the default) and chat")
    config = load_config(
        PrepareConfig,
        argv,
        prog="gptsmith prepare",
        description="Turn text into a tokenizer and token shards. `--format chat` turns "
        "conversations into token ids and labels instead, with options of its own.",
        positional="sources",
    )
    path = prepare(config)
    print(f"next: gptsmith inspect {path}")
    print(f"      gptsmith pretrain --data {path} --out runs/{path.absolute().name}")


def _format(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --format, and the other words."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    for i, word in enumerate(flags):
        if word.startswith("--format="):
            return word.removeprefix("--format="), argv[:i] + argv[i + 1 :]
        if word == "--format" and i + 1 < len(flags):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return "text", argv

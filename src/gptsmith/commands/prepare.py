"""`gptsmith prepare SOURCE... --out data/NAME`: text to tokenizer and token shards."""

from gptsmith import settings
from gptsmith.data.prepare import PrepareConfig, prepare


def main(argv: list[str]) -> None:
    config = settings.load(
        PrepareConfig,
        argv,
        prog="gptsmith prepare",
        description="Turn text into a tokenizer and token shards.",
        positional="sources",
    )
    path = prepare(config)
    print(f"next: gptsmith inspect {path}")
    print(f"      gptsmith pretrain --data {path} --out runs/{path.name}")

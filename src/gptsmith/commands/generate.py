"""`gptsmith generate RUN --prompt TEXT`: prints what the model writes, as it writes it."""

import sys
import textwrap
from typing import Annotated

from pydantic import Field

from gptsmith.config import load_config
from gptsmith.generate import engine
from gptsmith.generate.sampling import SamplingConfig
from gptsmith.run import Run
from gptsmith.run.options import WeightOptions
from gptsmith.tokenizer import Tokenizer


class GenerateOptions(SamplingConfig, WeightOptions):
    """What to continue, with which model, and how to draw."""

    prompt: tuple[str, ...] = ()
    """Text to continue, repeatable; `-` reads it from standard input, without its last line end
    (default: a new text)."""
    num_samples: int = Field(1, ge=1)
    """Continuations of each prompt; sample i has the seed SEED + i."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """End at this text and leave it out, repeatable."""


def main(argv: list[str]) -> None:
    options = load_config(
        GenerateOptions,
        argv,
        prog="gptsmith generate",
        description="Continue prompts with a trained model.",
        positional="run",
    )
    run = Run.open(options.run)
    tokenizer = run.tokenizer
    prompts = [(_standard_input() if p == "-" else p) for p in options.prompt] or [""]
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    rows = [(p, options.seed + i) for p in prompts for i in range(options.num_samples)]
    ids = [ids for ids in encoded for _ in range(options.num_samples)]
    model = options.load(run)
    limit = model.config.context_length
    if (longest := max(map(len, encoded))) > limit:
        print(
            f"a prompt has {longest:,} tokens, the model reads {limit:,}: it begins with the "
            f"newest {max(1, limit // 2):,}",
            file=sys.stderr,
        )
    live = len(rows) == 1 and sys.stdout.isatty()
    if live:
        print(rows[0][0], end="", flush=True)
    results = engine.generate(
        model,
        ids,
        options,
        tokenizer=tokenizer,
        stop_ids=[tokenizer.eos_id],
        stop=options.stop,
        seeds=[seed for _, seed in rows],
        on_token=(lambda row, piece: print(piece, end="", flush=True)) if live else None,
    )
    if live:
        print()
    for (prompt, seed), result in zip(rows, results, strict=True):
        if len(rows) > 1:
            print(f"--- seed {seed}{f', prompt {prompt!r}' if len(prompts) > 1 else ''}")
        if not live:
            print(prompt + result.text)
    for notice in dict.fromkeys(result.notice for result in results if result.notice):
        print(notice, file=sys.stderr)


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: standard input is not UTF-8 ({error.reason})") from None


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.prompt(prompt)
    except ValueError as error:
        raise ValueError(f"--prompt {textwrap.shorten(repr(prompt), 60)}: {error}") from None

"""`gptsmith generate RUN --prompt TEXT`: prints what the model writes, as it writes it."""

import sys

from pydantic import Field

from gptsmith import settings
from gptsmith.commands.weights import WeightOptions
from gptsmith.generate import engine
from gptsmith.generate.sample import SamplingConfig
from gptsmith.run import Run


class GenerateOptions(SamplingConfig, WeightOptions):
    """What to continue, with which model, and how to draw."""

    prompt: tuple[str, ...] = ()
    """Text to continue, repeatable; `-` reads it from standard input, without its last line end
    (default: a new text)."""
    num_samples: int = Field(1, ge=1)
    """Continuations of each prompt; sample i has the seed SEED + i."""
    stop: tuple[str, ...] = ()
    """End at this text and leave it out, repeatable."""


def main(argv: list[str]) -> None:
    options = settings.load(
        GenerateOptions,
        argv,
        prog="gptsmith generate",
        description="Continue prompts with a trained model.",
        positional="run",
    )
    run = Run.open(options.run)
    tokenizer = run.tokenizer
    prompts = [sys.stdin.read().removesuffix("\n") if p == "-" else p for p in options.prompt]
    rows = [(p, options.seed + i) for p in prompts or [""] for i in range(options.num_samples)]
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt, _ in rows]
    model = options.load(run)
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

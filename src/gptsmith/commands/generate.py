"""`gptsmith generate RUN --prompt TEXT`: continue prompts, streaming to a terminal."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gptsmith import terminal
from gptsmith.config import load_config
from gptsmith.generate.options import SamplingConfig
from gptsmith.run.options import Speculation, TextWeightOptions

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer


class GenerateOptions(SamplingConfig, Speculation, TextWeightOptions):
    """What to continue, with which model, and how to sample."""

    prompt: tuple[str, ...] = ()
    """Text to continue, repeatable; `-` reads it from standard input, without its final newline
    (default: start a new text)."""
    num_samples: int = Field(1, ge=1)
    """Continuations of each prompt; sample i has the seed SEED + i."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Stop before this text, repeatable."""


def main(argv: list[str]) -> None:
    options = load_config(
        GenerateOptions,
        argv,
        prog="gptsmith generate",
        description="Continue prompts with a trained model.",
        positional="run",
    )
    from gptsmith.generate.engine import Engine  # imports torch: not before help and option errors
    from gptsmith.generate.request import Request
    from gptsmith.run import Run

    run = Run.open(options.run)
    prompts = [(_standard_input() if p == "-" else p) for p in options.prompt] or [""]
    encoded = [_encode(run.tokenizer, prompt) for prompt in prompts]
    model = options.load(run)
    limit = model.config.context_length
    if (longest := max(map(len, encoded))) > limit:
        terminal.note(
            f"a prompt has {longest:,} tokens and the model reads {limit:,}: it continues from the "
            f"last {max(1, limit // 2):,}"
        )
    streams = len(prompts) * options.num_samples == 1 and sys.stdout.isatty()
    if streams:
        terminal.write(prompts[0], end="", flush=True)

    def show(piece: str) -> None:
        terminal.write(piece, end="", flush=True)

    engine = Engine(
        model,
        run.tokenizer,
        weights=options.engine_weights,
        keep_model=False,
        draft_model=options.load_draft(run, model.head_weight.device),
        draft_tokens=options.draft_tokens,
    )
    samples = [
        (prompt, seed, engine.add(
            Request(ids, options.with_seed(seed), options.stop, on_text=show if streams else None)
        ))
        for prompt, ids in zip(prompts, encoded, strict=True)
        for seed in range(options.seed, options.seed + options.num_samples)
    ]  # fmt: skip
    generations = [generation for _, _, generation in samples]
    for _ in engine.as_completed(generations):
        pass
    if streams:
        terminal.write("")
    for prompt, seed, generation in samples:
        if len(samples) > 1:
            terminal.say(f"--- seed {seed}{f', prompt {prompt!r}' if len(prompts) > 1 else ''}")
        if not streams:
            terminal.write(prompt + generation.text)
    for notice in dict.fromkeys(g.notice for g in generations if g.notice):
        terminal.note(notice)


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

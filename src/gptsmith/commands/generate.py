"""`gptsmith generate RUN --prompt TEXT`: continue prompts, streaming to a terminal."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from gptsmith import files, terminal
from gptsmith.commands.text_options import TextOptions
from gptsmith.config import load_config

if TYPE_CHECKING:
    from gptsmith.generate.constraint import Constraint
    from gptsmith.tokenizer import Tokenizer


class GenerateOptions(TextOptions):
    """Continue prompts with a trained model."""

    prompt: tuple[str, ...] = ()
    """Text to continue, repeatable; `-` reads it from standard input, without its final newline
    (default: start a new text)."""
    num_samples: int = Field(1, ge=1)
    """Continuations of each prompt; sample i has the seed SEED + i."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Stop before this text, repeatable."""
    json_schema: Path | None = None
    """File with a JSON schema that the text must meet."""
    regex: str | None = None
    """Regular expression that the whole text must match."""
    choice: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The text must be this one, or one of several; repeatable."""

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        if sum(bool(given) for given in (self.json_schema, self.regex, self.choice)) > 1:
            raise ValueError("give one of --json-schema, --regex and --choice")
        return self

    def constraint(self) -> Constraint | None:
        """What the text must be; None: anything."""
        from gptsmith.generate.constraint import Constraint

        if self.json_schema is not None:
            try:
                return Constraint.json(files.read_text(self.json_schema))
            except ValueError as error:
                raise ValueError(f"--json-schema {self.json_schema}: {error}") from None
        if self.regex is not None:
            return Constraint.regex(self.regex)
        return Constraint.choice(self.choice) if self.choice else None


def main(argv: list[str]) -> None:
    options = load_config(GenerateOptions, argv, prog="gptsmith generate", positional="run")
    from gptsmith.generate.request import Request  # imports torch: not before help, option errors
    from gptsmith.run import Run

    run = Run.open(options.run)
    given = options.prompt or ("",)
    prompts = [files.read_standard_input("--prompt -") if p == "-" else p for p in given]
    encoded = [_encode(run.tokenizer, prompt) for prompt in prompts]
    constraint = options.constraint()
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

    engine = options.engine(run, model)
    samples = [
        (prompt, seed, engine.add(
            Request(
                ids, options.with_seed(seed), options.stop,
                on_text=show if streams else None, constraint=constraint,
            )
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
    if errors := [generation.error for generation in generations if generation.error]:
        raise ValueError(errors[0])
    for notice in dict.fromkeys(g.notice for g in generations if g.notice):
        terminal.note(notice)


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.prompt(prompt)
    except ValueError as error:
        raise ValueError(f"--prompt {textwrap.shorten(repr(prompt), 60)}: {error}") from None

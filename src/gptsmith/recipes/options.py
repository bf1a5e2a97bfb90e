"""The sections of a configuration that every recipe shares, and how a command reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from gptsmith.config import Section, load_config
from gptsmith.run import stored_recipe
from gptsmith.train.monitor import command_start
from gptsmith.train.options import OptimConfig, PrecisionName


class TrainConfig(Section):
    """Horizon, batch and arithmetic."""

    steps: int | None = Field(None, ge=1)
    """Horizon in optimizer steps. One of steps, tokens, epochs, seconds (default: 1 epoch; 3
    when tuning, 4 for classes)."""
    tokens: int | None = Field(None, ge=1)
    """Horizon in training tokens, padding counted."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Horizon in passes over the data."""
    seconds: float | None = Field(None, gt=0)
    """Horizon in wall-clock seconds from the start of the command; a resumed run then ends
    elsewhere than an uninterrupted one."""
    batch_size: int = Field(32, ge=1)
    """Sequences that go through the model at once (micro-batch)."""
    total_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per optimizer step; micro-batches accumulate to it (default: one micro-batch)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of initial weights, sample order and dropout."""
    precision: PrecisionName = "auto"
    """Number format of matrix products; auto takes what this machine does well and says why."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles where it pays and says why."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    num_threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads (default: PyTorch's choice, which is then recorded)."""
    activation_checkpointing: bool = False
    """Run each block again in the backward pass: less memory, a third more time."""
    spike_sigmas: float = Field(8.0, ge=0)
    """Skip a step whose loss jumps by so many standard deviations of the last 64; 0: never."""
    max_skips: int = Field(10, ge=1)
    """Stop after so many skipped steps in a row."""

    @model_validator(mode="after")
    def _one_horizon(self) -> TrainConfig:
        given = [n for n in ("steps", "tokens", "epochs", "seconds") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both given: a run has one horizon; "
                f"--train.{given[0]} none takes that one back"
            )
        return self


class EvalConfig(Section):
    """What is measured and shown while the model trains."""

    interval: int = Field(100, ge=0)
    """Steps between evaluations; 0: at the end only."""
    tokens: int | None = Field(200_000, ge=1)
    """Validation tokens used while training, ten times as many at the end; none: all, always.
    `gptsmith evaluate` takes all."""
    patience: int = Field(0, ge=0)
    """Stop early after so many evaluations without a new best; 0: never."""
    prompt: str = ""
    """Beginning of the samples."""
    sample_tokens: int = Field(120, ge=0)
    """Length of the sample at each evaluation; 0: none."""
    tasks: tuple[str, ...] = ()
    """Questions of multiple choice to ask as well (hellaswag_gpt2, piqa ...), repeatable; drawn
    below the loss."""
    task_data: Path | None = None
    """Their files (default: $GPTSMITH_DATA, else the Hub)."""
    task_items: int = Field(200, ge=1)
    """Questions of each task, the first ones: the standard error of 200 is 3%."""


class SaveConfig(Section):
    """Checkpoints: always at step 0, at a new best, on SIGTERM or SIGINT, and at the end."""

    interval: int = Field(0, ge=0)
    """Steps between checkpoints besides those; 0: by the clock only."""
    seconds: float = Field(60.0, gt=0)
    """At most so much work is lost."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept, besides the best."""


class MonitorConfig(Section):
    """Where the metrics go besides metrics.jsonl, metrics.csv and curves.png."""

    trackers: tuple[str, ...] = ("auto",)
    """auto (TensorBoard if it is installed), none, tensorboard, wandb, mlflow, trackio."""
    log_interval: int = Field(10, ge=1)
    """Steps between lines of metrics."""


class Recipe(Section):
    """What every recipe asks for."""

    default_epochs: ClassVar[float] = 1  # without a horizon

    out: Path
    """Run folder to write."""
    resume: bool = False
    """Go on from the newest good checkpoint of the run folder."""
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    monitor: MonitorConfig = MonitorConfig()


R = TypeVar("R", bound=Recipe)


def command(
    verb: str,
    kind: type[R],
    recipe: Callable[[R, float | None], int],
    argv: Sequence[str],
    started: float | None,
) -> int:
    """`gptsmith VERB [RECIPE.yaml] [--section.field VALUE]`: the exit code of the recipe.

    kind: its configuration, whose docstring is the description. started: see loop.train; default
    the start of the command.
    """

    def stored(flags: Mapping[str, Any], words: list[str]) -> list[str]:
        """On --resume, the run's own recipe."""
        if not flags.get("resume") or "out" not in flags:
            return words
        known = {field.alias or name for name, field in kind.model_fields.items()}
        return stored_recipe(Path(flags["out"]), words, flags, known, verb)

    config = load_config(
        kind, argv, prog=f"gptsmith {verb}", description=kind.__doc__ or "", recipe=stored
    )
    return recipe(config, command_start() if started is None else started)

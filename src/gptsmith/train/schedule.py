"""Learning-rate schedules, as a pure function of the step, the elapsed time and the duration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from gptsmith.train.options import OptimConfig


@dataclass(frozen=True)
class Duration:
    """The length of a run: a number of steps, or of seconds."""

    steps: int | None
    seconds: float | None

    def progress(self, step: int, seconds: float) -> float:
        """The completed fraction of the run."""
        return step / self.steps if self.steps else seconds / (self.seconds or 1)

    def __str__(self) -> str:
        return f"step {self.steps:,}" if self.steps else f"{self.seconds:,.0f} s"


def warmup_steps(config: OptimConfig, duration: Duration) -> int:
    """Steps of warm-up: as configured, or half of a run that would end before its peak.

    The steps of a run with a time limit are not known, so there it is always as configured.
    """
    steps = duration.steps
    if config.decay_start == "first-step" or steps is None or config.warmup_steps < steps:
        return config.warmup_steps
    return steps // 2


def learning_rate(
    config: OptimConfig, duration: Duration, step: int, seconds: float, warmup_seconds: float = 0.0
) -> float:
    """The learning rate of optimizer step `step` (from 0), which begins after `seconds`.

    Warm-up is linear; the step after it has the peak, and from there to the end of the run the rate
    decays. warmup_seconds: when that step began, for a run with a time limit. cosine: Loshchilov &
    Hutter 2017, without restarts. wsd (warmup, stable, decay; Hu et al. 2024): constant until the
    last `decay_fraction` of the run, then linear. With decay_start "first-step", the decay begins
    at step 0 and warm-up multiplies it, so the peak is never reached.
    """
    warmup = warmup_steps(config, duration)
    progress = min(duration.progress(step, seconds), 1.0)  # a time limit may be overrun
    begin = 0.0  # of the decay, as a fraction of the run
    if config.decay_start == "after-warmup":
        begin = 1.0 if step < warmup else duration.progress(warmup, warmup_seconds)
    left = max(1 - begin, 1e-9)
    decayed = max((progress - begin) / left, 0.0)
    match config.schedule:
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * decayed))
        case "linear":
            shape = 1 - decayed
        case "wsd":
            shape = min(1.0, (1 - decayed) / min(1.0, config.decay_fraction / left))
        case "constant":
            shape = 1.0
        case _:
            assert_never(config.schedule)
    ramp = min(1.0, (step + 1) / (warmup + 1))
    final = config.min_lr_ratio
    return config.learning_rate * (ramp * (final + (1 - final) * shape))


@dataclass
class LearningRate:
    """The learning rate of a run. Its state is the time at which warm-up ended, which is needed for
    runs with a time limit."""

    config: OptimConfig
    duration: Duration
    warmup_seconds: float | None = None

    def at(self, step: int, seconds: float) -> float:
        """The rate of step `step` (from 0), which begins after `seconds`."""
        ended = seconds if self.warmup_seconds is None else self.warmup_seconds
        return learning_rate(self.config, self.duration, step, seconds, ended)

    def start_step(self, step: int, seconds: float) -> float:
        """The rate of the step that begins now; records the time at which warm-up ended."""
        if self.warmup_seconds is None and step >= warmup_steps(self.config, self.duration):
            self.warmup_seconds = seconds
        return self.at(step, seconds)

    def state(self, step: int, seconds: float) -> dict[str, float | None]:
        """What a checkpoint keeps after `step` steps."""
        return {"warmup_seconds": self.warmup_seconds, "next": self.at(step, seconds)}

    def load(self, state: Mapping[str, float | None], step: int, seconds: float) -> str:
        """The inverse of `state`; returns a note if the rate jumps because the configuration has
        changed, else an empty string."""
        if step > warmup_steps(self.config, self.duration):  # else that step is yet to begin
            self.warmup_seconds = state["warmup_seconds"]
        before, now = state["next"], self.at(step, seconds)
        progress = self.duration.progress(step, seconds)
        if before is None or progress >= 1 or math.isclose(now, before, rel_tol=0.01):
            return ""
        return (
            f"the learning rate stands at {before:.4g} and jumps to {now:.4g}, because the "
            f"configuration has changed: the run now ends at {self.duration} "
            f"({progress:.0%} is done)"
        )

    def unreached_peak(self, step: int) -> str:
        """A note if a run of `step` steps ended before the peak; usually empty."""
        warmup = warmup_steps(self.config, self.duration)
        if self.config.decay_start == "first-step" or not 0 < step <= warmup:
            return ""
        return (
            f"the run ended during its warm-up of {warmup:,} steps: the learning rate reached "
            f"{self.at(step - 1, 0):.3g} of {self.config.learning_rate:.3g}; lower "
            "optim.warmup_steps"
        )

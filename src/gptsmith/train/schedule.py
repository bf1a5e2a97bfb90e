"""Learning-rate schedules: a pure function of the step and of the completed fraction of the run."""

from __future__ import annotations

import math
from typing import assert_never

from gptsmith.train.options import OptimConfig


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """The learning rate of optimizer step `step` (from 0).

    progress: completed fraction of the run when the step begins, in [0, 1): of its steps or of its
    seconds, so that a run with a time limit decays fully too. Warmup is linear and multiplies
    the rest. cosine: Loshchilov & Hutter 2017, without restarts. wsd (warmup, stable, decay; Hu et
    al. 2024): constant until the last `decay_fraction` of the run, then linear.
    """
    progress = min(max(progress, 0.0), 1.0)
    match config.schedule:
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            shape = 1 - progress
        case "wsd":
            shape = min(1.0, (1 - progress) / config.decay_fraction)
        case "constant":
            shape = 1.0
        case _:
            assert_never(config.schedule)
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    final = config.min_lr_ratio
    return config.learning_rate * (warmup * (final + (1 - final) * shape))

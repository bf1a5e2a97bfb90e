"""Learning-rate schedules as one pure function of the step and of the share of the run done."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "wsd", "constant"]


def multiplier(
    schedule: Schedule,
    step: int,
    progress: float,
    *,
    warmup_steps: int,
    final: float = 0.0,
    decay_fraction: float = 0.3,
) -> float:
    """Factor of the peak learning rate for the optimizer step `step` (counted from 0).

    progress: share of the run that is done when the step begins, in [0, 1): steps, tokens or
    seconds over their horizon, so that a run limited by the clock decays to its end too.
    Warmup is linear over `warmup_steps` and multiplies the rest. `final` is the factor at the end.
    wsd (warmup, stable, decay; Hu et al. 2024) is flat until the last `decay_fraction`, then
    linear. cosine is Loshchilov & Hutter 2017 without restarts.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        shape = 1 - progress
    elif schedule == "wsd":
        shape = min(1.0, (1 - progress) / decay_fraction)
    else:
        shape = 1.0
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    return warmup * (final + (1 - final) * shape)

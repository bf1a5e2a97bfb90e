"""Checks of metrics.jsonl when a run is resumed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from gptsmith.recipes.run_state import RunState
from gptsmith.train.monitor import count_events, read_events


def lost_history(metrics: Path, step: int, recorded: int | None, log_interval: int) -> str:
    """A remark if metrics.jsonl has fewer events than when the checkpoint of `step` was written.

    recorded: how many it had then; None in a checkpoint of an earlier version: then only lines that
    are gone at the end of the file are noticed, by steps farther apart than any before.
    """
    events = read_events(metrics, until=step)
    if recorded is None:
        steps = [0, *(event["step"] for event in events if event["event"] == "train")]
        usual = max([log_interval, *(b - a for a, b in pairwise(steps))])
        if step == 0 or (steps[-1] and step - steps[-1] <= usual):
            return ""
        found = f"has no metrics behind step {steps[-1]:,} of {step:,}"
    else:
        lost = recorded - count_events(events)
        if lost <= 0:
            return ""
        found = f"lacks {lost:,} of {recorded:,} events up to step {step:,}"
    return f"{metrics} {found}: curve and report lack them, unless you restore the file from a copy"


def last_rate(metrics: Path, state: RunState) -> dict[str, float | None]:
    """A replacement for the learning-rate state that checkpoints of earlier versions lack: the
    last recorded rate, if this configuration gives another one for that step."""
    events = read_events(metrics, until=state.step)
    trained = [e for e in events if e["event"] == "train" and "learning_rate" in e]
    found: dict[str, float | None] = {"warmup_seconds": None, "next": None}
    if trained:
        rate, step, seconds = (trained[-1][n] for n in ("learning_rate", "step", "seconds"))
        planned = state.learning_rate.at(step - 1, seconds)
        found["next"] = None if math.isclose(rate, planned, rel_tol=0.01) else rate
    return found

"""What the metrics of a run tell when it is resumed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from gptsmith.recipes.run_state import RunState
from gptsmith.train.monitor import read_events


def lost_history(metrics: Path, state: RunState, log_interval: int) -> str:
    """A remark if metrics.jsonl ends before the checkpoint: whole lines at its end are gone."""
    events = read_events(metrics, until=state.step)
    steps = [0, *(event["step"] for event in events if event["event"] == "train")]
    usual = max([log_interval, *(b - a for a, b in pairwise(steps))])
    if (steps[-1] and state.step - steps[-1] <= usual) or not state.step:
        return ""
    return (
        f"{metrics} has no metrics behind step {steps[-1]:,} of {state.step:,}: "
        "curve and report lack them, unless you restore the file from a copy"
    )


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

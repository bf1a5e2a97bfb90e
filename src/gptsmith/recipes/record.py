"""What the metrics of a run tell when it is resumed."""

from __future__ import annotations

import math
from pathlib import Path

from gptsmith.recipes.run_state import RunState
from gptsmith.train.monitor import count_events, read_events


def lost_history(metrics: Path, step: int, recorded: int | None) -> str:
    """A remark if metrics.jsonl has fewer events than when the checkpoint of `step` was written.

    recorded: how many it had then; None in a checkpoint of an earlier version.
    """
    lost = (recorded or 0) - count_events(read_events(metrics, until=step))
    if lost <= 0:
        return ""
    return (
        f"{metrics} lacks {lost:,} of {recorded:,} events up to step {step:,}: "
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

"""Monitors without output, and what they are told."""

import io
import math
from pathlib import Path
from typing import Any

from gptsmith.console import Console
from gptsmith.train.monitor import Monitor


def quiet(folder: Path, **options: Any) -> Monitor:
    """No tracker, no output."""
    defaults: dict[str, Any] = {"total_steps": 100, "config": {}, "trackers": ()}
    defaults["console"] = Console(file=io.StringIO())
    folder.mkdir(exist_ok=True)
    return Monitor(folder, **{**defaults, **options})


def train_on(m: Monitor, steps: range) -> None:
    for step in steps:
        loss = 1.5 + 2.5 * math.exp(-step / 20)
        rate = 1e-3 * (1 - step / 100)
        m.log(step, train_loss=loss, learning_rate=rate, tokens=step * 768, epoch=step / 50)
        if step % 20 == 0:
            m.log(step, "val", val_loss=loss + 0.1, perplexity=math.exp(loss + 0.1))

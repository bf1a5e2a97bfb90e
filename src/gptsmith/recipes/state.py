"""Where a run stands, its way to disk and back, and the signals that ask it to stop."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from gptsmith.train import checkpoint
from gptsmith.train.loop import Guard
from gptsmith.train.optim import Optimizer


@dataclass
class Progress:
    """What changes while a run goes on, besides weights and optimizer."""

    guard: Guard
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    evals_since_best: int = 0
    saved_at: float = field(default_factory=time.perf_counter)

    def improves(self, loss: float) -> bool:
        """Take note of an evaluation; whether it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
            return True
        self.evals_since_best += 1
        return False


_PLAIN = ("step", "tokens", "seconds", "best_step", "best_loss", "evals_since_best")


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: Optimizer,
    position: dict[str, int],
    keep_last: int,
) -> None:
    """Write a checkpoint durably, then drop old ones, but never the best.

    position: where the data stands, compared on resume.
    """
    state = {name: getattr(progress, name) for name in _PLAIN}
    state["best_loss"] = progress.best_loss if math.isfinite(progress.best_loss) else None
    state.update(guard=progress.guard.state(), position=position)
    if progress.scaler is not None:
        state["scaler"] = progress.scaler.state_dict()
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_tensors()}
    checkpoint.save(folder, progress.step, tensors, state)
    best = {progress.best_step} if math.isfinite(progress.best_loss) else set()
    checkpoint.prune(folder, keep_last, best)
    progress.saved_at = time.perf_counter()


def restore(
    folder: Path, progress: Progress, model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, int], list[str]]:
    """Read the newest good checkpoint into the arguments.

    Returns the position of the data and, for each damaged newer checkpoint, a line that says so.
    """
    found, damage = checkpoint.find(folder)
    state = found.state
    model.load_state_dict(found.load("model"))
    optimizer.load_state_tensors(found.load("optimizer"))
    for name in _PLAIN:
        setattr(progress, name, state[name])
    if progress.best_loss is None:
        progress.best_loss = math.inf
    progress.guard.load(state["guard"])
    if progress.scaler is not None and "scaler" in state:
        progress.scaler.load_state_dict(state["scaler"])
    checkpoint.clean(folder, after=found.step)
    return state["position"], damage


class StopSignal:
    """While entered, SIGTERM and SIGINT set `received` and nothing else; a second one kills."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

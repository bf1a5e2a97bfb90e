"""Where a run stands, and its way to disk and back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from gptsmith.model.tuning import load_trainable_state_dict, trainable_state_dict
from gptsmith.train import checkpoint
from gptsmith.train.optim import Optimizer
from gptsmith.train.step import LossSpikeGuard


@dataclass
class Progress:
    """What changes while a run goes on, besides weights and optimizer."""

    guard: LossSpikeGuard
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
    tensors = {"model": trainable_state_dict(model), "optimizer": optimizer.state_tensors()}
    checkpoint.save(folder, progress.step, tensors, state)
    best = {progress.best_step} if math.isfinite(progress.best_loss) else set()
    checkpoint.prune(folder, keep_last, best)
    progress.saved_at = time.perf_counter()


def restore(
    found: checkpoint.Checkpoint, progress: Progress, model: nn.Module, optimizer: Optimizer
) -> dict[str, int]:
    """Read a checkpoint into the arguments; newer ones go. Returns the position of the data."""
    state = found.state
    load_trainable_state_dict(model, found.load("model"), found.path)
    optimizer.load_state_tensors(found.load("optimizer"))
    for name in _PLAIN:
        setattr(progress, name, state[name])
    if progress.best_loss is None:
        progress.best_loss = math.inf
    progress.guard.load(state["guard"])
    if progress.scaler is not None and "scaler" in state:
        progress.scaler.load_state_dict(state["scaler"])
    checkpoint.clean(found.path.parent, after=found.step)
    position: dict[str, int] = state["position"]
    return position

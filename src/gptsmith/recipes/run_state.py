"""The state of a run besides weights and optimizer, which every checkpoint contains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptsmith.train.schedule import LearningRate
from gptsmith.train.step import LossSpikeGuard


@dataclass
class RunState:
    """The state of a run besides weights and optimizer."""

    guard: LossSpikeGuard
    learning_rate: LearningRate
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    evals_since_best: int = 0

    def improves(self, loss: float) -> bool:
        """Record the loss of an evaluation; returns whether it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
            return True
        self.evals_since_best += 1
        return False

    def to_json(self) -> dict[str, object]:
        state = {name: getattr(self, name) for name in _JSON_FIELDS}
        state["best_loss"] = self.best_loss if math.isfinite(self.best_loss) else None
        state["guard"] = self.guard.state()
        state["learning_rate"] = self.learning_rate.state(self.step, self.seconds)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_json(self, state: Mapping[str, Any]) -> None:
        for name in _JSON_FIELDS:
            setattr(self, name, state[name])
        if self.best_loss is None:
            self.best_loss = math.inf
        self.guard.load(state["guard"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


_JSON_FIELDS = ("step", "tokens", "seconds", "best_step", "best_loss", "evals_since_best")

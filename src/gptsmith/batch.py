"""Batches, which the data loaders yield and the losses take. B rows, T tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The target of a position that is read but not predicted."""


@dataclass(frozen=True, repr=False)
class Batch:
    """Token ids and the target of each position.

    inputs     (B, T) int64
    targets    (B, T) int64, IGNORE_INDEX where there is none
    documents  (B, T) int64: positions attend only to positions with the same number
    positions  (B, T) int64: position of each token in its document; default 0..T-1
    same_as    (B, T) int64: number b * T + t of the position that stands for all with the same
               tokens up to them, which are computed once; -1: padding; default: all are computed
    name       describes the samples in error messages
    count      what the summed loss is divided by, after adding it up over all micro-batches and
               ranks of a step; default the number of targets (for preferences, of pairs)
    tokens     number of inputs that are not padding; default all of them

    A loss that needs more of its data (log-probabilities of a reference, advantages) gets it as
    further fields of a subclass, which is a frozen dataclass too.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None
    same_as: Tensor | None = None
    name: str = "batch"
    count: int = -1
    tokens: int = -1

    def __post_init__(self) -> None:
        if self.count < 0:
            object.__setattr__(self, "count", int((self.targets != IGNORE_INDEX).sum()))
        if self.tokens < 0:
            object.__setattr__(self, "tokens", self.inputs.numel())

    def __repr__(self) -> str:
        B, *T = self.inputs.shape
        rows = " x ".join(map(str, [B, *T]))
        packed = "" if self.documents is None else ", several documents in a row"
        return f"Batch({self.name!r}, {rows} tokens, count {self.count:,}{packed})"

    def without_targets(self) -> Self:
        """The same inputs, of which nothing is learned: a sum of 0 and a zero gradient."""
        targets = torch.full_like(self.targets, IGNORE_INDEX)
        return replace(self, targets=targets, name="", count=0, tokens=0)

    def pinned(self) -> Self:
        """The same batch in pinned memory, from which a copy to a GPU is not waited for."""
        return self._map(lambda x: x if x.is_pinned() else x.pin_memory())

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        batch = self.pinned() if device.type == "cuda" else self
        return batch._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: Any = {name: change(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, repr=False)
class PairBatch(Batch):
    """n pairs of answers in 2 n rows: those of the chosen answers, then those of the rejected ones.

    count      n
    reference  (2 n,) fp32: log-probability of each row's targets under the reference model; None
               for a loss without one
    """

    reference: Tensor | None = None


@dataclass(frozen=True, repr=False, kw_only=True)
class PolicyBatch(Batch):
    """Completions that a policy has sampled, one in each row; the targets are its tokens.

    `tokens` are those of the rows: equal completions count once, a prompt in each row.

    advantages  (B, T) fp32: how much better the reward is than that of other completions of the
                prompt, credited to each target; 0 elsewhere
    weights     (B,) fp32: factor of each row's loss, for the normalisation over the step
    copies      (B,) int64: how many equal completions of the prompt a row stands for; loss, metrics
                and `count` are those of all of them
    old         (B, T) fp32: log-probabilities of the targets by the policy that sampled them, 0
                elsewhere; None: by the present one
    reference   (B, T) fp32: by the reference model, for a KL penalty
    """

    advantages: Tensor
    weights: Tensor
    copies: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            targets = (self.targets != IGNORE_INDEX).sum(dim=1)
            object.__setattr__(self, "count", int(targets @ self.copies))
        super().__post_init__()

"""The training step of all recipes: a generator that yields after each optimizer step.

What happens between steps (logging, evaluation, checkpoints) is in recipes/loop.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.batch import Batch
from gptsmith.train import distributed, sharding
from gptsmith.train.fp8 import use_fp8
from gptsmith.train.optim import Optimizer
from gptsmith.train.runtime import Precision

# (model, batch) -> sum over the batch, undivided, and sums of its metrics, if it has any, by name;
# the names are the same in every batch
Summed = Tensor | tuple[Tensor, Mapping[str, Tensor]]
Loss = Callable[[Any, Batch], Summed]


def loss_and_metrics(found: Summed) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What a loss returned, with the metrics that it may have left out."""
    return found if isinstance(found, tuple) else (found, {})


class LossOfModel(nn.Module):
    """Model and loss as one module, since DistributedDataParallel adds up the gradients of what its
    own forward has computed, and losses call other methods of the model."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> Summed:
        return self.loss(self.model, batch)


class TrainingDiverged(ValueError):
    """Too many steps in a row were skipped.

    Weights, optimizer, scaler and guard are those after the last yielded step; only the gradients
    are those of the bad batch. The caller may evaluate and save a checkpoint of that step. The
    generator has ended. A run that resumes from the checkpoint gets the same batch again, and
    diverges again unless a setting has changed.
    """


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `step` counts from 1; `loss` and `metrics`, which the loss may
    have, are means over the step."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # inputs over all ranks, without padding
    skipped: str = ""  # why the weights were not updated, naming the batch; empty if they were
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class LossSpikeGuard:
    """Skips steps whose loss or gradient is not finite, or whose loss jumps.

    A jump is a loss more than `sigmas` standard deviations, and at least one nat, above the mean of
    the last 64; sigmas 0 disables this check. `patience` skipped steps in a row raise
    TrainingDiverged.
    """

    sigmas: float = 8.0
    patience: int = 10
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    skipped: int = 0
    in_a_row: int = 0

    def check(
        self, step: int, loss: float, grad_norm: float, names: Callable[[], Sequence[str]]
    ) -> str:
        """Why this step (counted from 1) must be skipped; empty if it is good.

        names: of the batches; called for a bad step. Raises TrainingDiverged.
        """
        reason = ""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            reason = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        elif self.sigmas and len(self.recent) == 64:
            mean = sum(self.recent) / 64
            std = math.sqrt(sum((x - mean) ** 2 for x in self.recent) / 64)
            if loss > mean + max(1.0, self.sigmas * std):
                reason = f"loss {loss:.4g} jumped from {mean:.4g}"
        if not reason:
            self.in_a_row = 0
            self.recent.append(loss)
            return ""
        reason = f"step {step:,} skipped: {reason} in {', '.join(names())}"
        if self.in_a_row + 1 >= self.patience:  # not counted: see TrainingDiverged
            raise TrainingDiverged(
                f"{reason}; {self.in_a_row + 1} steps in a row were skipped, so training stops: "
                "lower --optim.learning-rate, inspect these samples, or try --train.precision fp32"
            )
        self.skipped += 1
        self.in_a_row += 1
        return reason

    def state(self) -> dict[str, object]:
        return {"recent": list(self.recent), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        self.recent.extend(state["recent"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def train_steps(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Sequence[Batch]],
    optimizer: Optimizer,
    *,
    learning_rate: Callable[[int], float],
    precision: Precision,
    max_grad_norm: float,
    seed: int,
    first_step: int = 0,
    guard: LossSpikeGuard | None = None,
    scaler: torch.amp.GradScaler | None = None,
    interrupt: Callable[[], None] = lambda: None,
) -> Iterator[Step]:
    """Train endlessly; the caller breaks out of the loop.

    batches: step -> this rank's micro-batches, a pure function of the step, as is learning_rate;
    each rank has equally many, and the i-th of rank r is number i * world_size + r of the step.
    The loss is divided by the `count` of the whole step, over all micro-batches and ranks: with
    masked targets, the mean of the micro-batches' means would be a different number. Random numbers
    (dropout) depend on seed, step and number of the micro-batch only, so that a resumed run draws
    the same ones, and 2 ranks with a micro-batch each the same as 1 rank with two. fp16 needs a
    scaler. interrupt: called before each micro-batch of a step, which it abandons by raising:
    weights, optimizer, scaler and guard are then those after the last yielded step.
    """
    guard = guard or LossSpikeGuard()
    if precision.name == "fp8":
        use_fp8(model)
    device = next(model.parameters()).device
    params = [p for p in model.parameters() if p.requires_grad]
    ranks, rank = distributed.world_size(), distributed.rank()
    parallel = None
    compute: Callable[[Batch], Summed] = partial(loss, model)
    clip: Callable[[list[nn.Parameter], float], Tensor] = nn.utils.clip_grad_norm_
    step = first_step
    if sharding.is_sharded(model):  # it adds gradients up after every micro-batch, to divide them
        compute = partial(sharding.forward, model, loss)
        clip = sharding.clip_grad_norm
    elif ranks > 1:
        compute = parallel = distributed.data_parallel(LossOfModel(model, loss))
        # DDP arranges gradients in the order of its first backward pass. With three or more ranks,
        # the order of addition follows from it: it must not change after the first step of a
        # process, or a resumed run would differ.
        with precision.autocast():
            empty = parallel(batches(step)[0].without_targets().to(device))
            loss_and_metrics(empty)[0].backward()
    while True:
        model.train()
        micro_batches = batches(step)
        counts = (sum(b.count for b in micro_batches), sum(b.tokens for b in micro_batches))
        count, tokens = map(int, distributed.sums(*counts))
        count = max(1, count)
        total = torch.zeros((), device=device)
        metrics: dict[str, Tensor] = {}
        optimizer.zero_grad()
        for i, batch in enumerate(micro_batches):
            interrupt()
            torch.manual_seed(derive_seed(seed, step, i * ranks + rank, 0))
            last = i == len(micro_batches) - 1  # gradients are added up over ranks once
            with nullcontext() if parallel is None or last else parallel.no_sync():
                with precision.autocast():
                    summed, measured = loss_and_metrics(compute(batch.to(device)))
                    share = summed / count
                (scaler.scale(share) if scaler else share).backward()
            total += share.detach()
            for name, value in measured.items():
                metrics[name] = metrics.get(name, torch.zeros_like(total)) + value.detach() / count
        if scaler:
            for each in optimizer.optimizers:
                scaler.unscale_(each)
        norm = clip(params, max_grad_norm or math.inf)
        means = distributed.sum_over_ranks(torch.stack([total, *metrics.values()]))
        # a GPU is waited for once
        grad_norm, mean_loss, *measures = torch.cat([norm.view(1), means]).tolist()
        rate = learning_rate(step)
        overflow = math.isfinite(mean_loss) and not math.isfinite(grad_norm)
        if scaler and overflow and scaler.get_scale() > 1:
            # A scaler causes overflow by design and then lowers its scale: the batch is not bad.
            scale = f"{scaler.get_scale():g}"
            skipped = f"step {step + 1:,} skipped: fp16 overflow at loss scale {scale}"
        else:
            names = partial(_names_of_all_ranks, micro_batches)
            skipped = guard.check(step + 1, mean_loss, grad_norm, names)
        if not skipped:
            optimizer.set_learning_rate(rate)
            optimizer.step()
        if scaler:
            scaler.update()
        if step == first_step:
            distributed.expect_steps()
        step += 1
        measured_means = dict(zip(metrics, measures, strict=True))
        yield Step(step, mean_loss, grad_norm, rate, tokens, skipped, measured_means)


def _names_of_all_ranks(micro_batches: Sequence[Batch]) -> list[str]:
    """The names of the step's batches in their order; empty shares have none."""
    names = distributed.from_all([batch.name for batch in micro_batches])
    return [name for of_ranks in zip(*names, strict=True) for name in of_ranks if name]


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on every one of the numbers (finaliser of splitmix64)."""
    x = 0
    for n in numbers:
        x = (x + n + 0x9E3779B97F4A7C15) & (2**64 - 1)
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        x ^= x >> 31
    return x >> 1

"""What a step needs from a task: a batch, and loss(model, batch) -> (summed loss, scored tokens).

B batch, T time, N = B * T, C channels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100
# fp32 logits alive at once. Each chunk reads and writes the whole gradient of the head, so small
# chunks cost time, large ones memory.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}


@dataclass(frozen=True)
class Batch:
    """inputs (B, T) int64; targets (B, T) int64, -100 = not scored.

    documents (B, T): attention stays inside equal numbers. positions (B, T): where they restart.
    name says which samples these are, for error messages.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None
    name: str = "batch"

    def to(self, device: torch.device) -> Batch:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            documents=move(self.documents),
            positions=move(self.positions),
        )


class LanguageModel(Protocol):
    """What the losses need of a model: vectors before the head, and the head's matrix."""

    @property
    def head_weight(self) -> Tensor: ...

    def hidden(
        self, ids: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor: ...


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T, chunk by chunk of rows, logits never whole.

    The gradients are made in the forward pass, while a chunk's probabilities are at hand, and
    scaled in the backward pass: one pass over the logits instead of two, and no logits are saved
    (the idea of Liger-Kernel and of Wijmans et al. 2024, "Cut your losses").
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        w = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        columns = torch.arange(weight.shape[0], device=hidden.device)
        grads = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            h = h.to(dtype)
            logits = (h @ w.T).float()  # (rows, V)
            scored = y != IGNORE
            label = y.clamp(min=0).unsqueeze(1)  # (rows, 1)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            loss = loss + ((lse - logits.gather(1, label)).squeeze(1) * scored).sum()
            g = (logits - lse).exp() - (columns == label).float()  # softmax - one-hot
            g = (g * scored.unsqueeze(1)).to(dtype)
            grads.append(g @ w)
            grad_weight += g.T @ h
        ctx.save_for_backward(torch.cat(grads), grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        hidden_dtype, weight_dtype = ctx.dtypes  # type: ignore[attr-defined]
        return (
            (grad_hidden * grad).to(hidden_dtype),
            (grad_weight * grad).to(weight_dtype),
            None,
            None,
            None,
        )


def chunk_rows(N: int, V: int, device: torch.device) -> int:
    """Rows of logits to hold at once: equal chunks of at most CHUNK_BYTES fp32."""
    chunks = -(-N * V * 4 // CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]))
    return -(-N // chunks)


def next_token_loss(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the next token, in nats, and the number of scored tokens."""
    hidden = model.hidden(batch.inputs, positions=batch.positions, documents=batch.documents)
    hidden = hidden.flatten(0, 1)  # (N, C)
    weight = model.head_weight
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = chunk_rows(hidden.shape[0], weight.shape[0], hidden.device)
    targets = batch.targets.flatten()
    return LinearCrossEntropy.apply(hidden, weight, targets, dtype, rows), (targets != IGNORE).sum()


def score_from(batch: Batch, start: int) -> Batch:
    """The batch with positions before `start` read but not scored, in place: under a prefix mask
    they see their own target (model/leakage.py)."""
    batch.targets[:, :start] = IGNORE
    return batch

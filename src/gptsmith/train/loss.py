"""Losses: loss(model, batch) -> sum over the batch, which the step divides by its count.

A loss may return (sum, metrics) instead: sums over the batch by name, which are divided alike.

B batch, T time, N = B * T, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch

# Bytes of one chunk of fp32 logits; computing its gradient takes 2.4 times that memory. Each chunk
# reads and writes the whole gradient of the head: small chunks cost time, large ones memory.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}


class Backbone(Protocol):
    """What every loss needs from a model: the hidden states before the head."""

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        same_as: Tensor | None = None,
    ) -> Tensor: ...


class LanguageModel(Backbone, Protocol):
    @property
    def head_weight(self) -> Tensor: ...


class Classifier(Backbone, Protocol):
    @property
    def score(self) -> Callable[[Tensor], Tensor]: ...


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T in chunks of rows; the full logits never exist.

    The gradients are computed in the forward pass, from each chunk's probabilities, and scaled in
    the backward pass: one pass over the logits instead of two, and no logits are saved (the idea of
    Liger-Kernel and of Wijmans et al. 2024, "Cut your losses").
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
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        w = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        columns = torch.arange(weight.shape[0], device=hidden.device)
        # In fp16 a sum over thousands of rows may exceed 65504; the loss scale comes too late to
        # prevent it. Summing h / sqrt(rows) does, and sums of random signs keep their precision.
        shrink = rows**0.5 if dtype == torch.float16 else 1.0
        grads = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            h = h.to(dtype)
            logits = (h @ w.T).float()  # (rows, V)
            is_target = y != IGNORE_INDEX
            label = y.clamp(min=0).unsqueeze(1)  # (rows, 1)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            loss = loss + ((lse - logits.gather(1, label)).squeeze(1) * is_target).sum()
            if need_hidden or need_weight:
                # softmax - one-hot, in the memory of the logits
                logits.sub_(lse).exp_().sub_((columns == label).float())
                g = logits.mul_(is_target.unsqueeze(1)).to(dtype)
                if need_hidden:
                    grads.append(g @ w)
                if grad_weight is not None:
                    grad_weight.add_(g.T @ (h / shrink), alpha=shrink)
                del g
            del logits  # before the next chunk's are allocated
        grad_hidden = torch.cat(grads) if need_hidden else None
        ctx.save_for_backward(grad_hidden, grad_weight)  # type: ignore[arg-type]
        ctx.dtypes = hidden.dtype, weight.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        hidden_dtype, weight_dtype = ctx.dtypes  # type: ignore[attr-defined]

        def scaled(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            # in fp32: a loss scale of 65536 would overflow fp16
            return None if x is None else (x.float() * grad).to(dtype)

        return (
            scaled(grad_hidden, hidden_dtype),
            scaled(grad_weight, weight_dtype),
            None,
            None,
            None,
        )


def chunk_rows(N: int, V: int, device: torch.device) -> int:
    """Rows per chunk of logits: chunks are equal and at most CHUNK_BYTES in fp32."""
    chunks = -(-N * V * 4 // CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]))
    return -(-N // chunks)


def next_token_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Summed next-token cross-entropy in nats, an fp32 scalar."""
    hidden, weight, dtype = _before_head(model, batch)
    rows = chunk_rows(hidden.shape[0], weight.shape[0], hidden.device)
    targets = batch.targets.flatten()
    loss: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, dtype, rows)
    return loss


def hidden_states(model: Backbone, batch: Batch) -> Tensor:
    """The vectors (B, T, C) of a batch before the head."""
    return model.hidden(
        batch.inputs, positions=batch.positions, documents=batch.documents, same_as=batch.same_as
    )


def _before_head(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor, torch.dtype]:
    """Hidden states (N, C), the head's weight (V, C), and the dtype of their product."""
    hidden, weight = hidden_states(model, batch).flatten(0, 1), model.head_weight
    if not torch.is_grad_enabled():  # needs_input_grad does not take this into account
        hidden, weight = hidden.detach(), weight.detach()
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden, weight, dtype


class TargetLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T) at the targets (N,) and, if `entropy`, the entropy of each row
    (N,), in chunks of rows. Both are 0 without a target, and the entropy has no gradient.

    What a loss makes of the log-probabilities is not known in the forward pass, so unlike in
    LinearCrossEntropy the backward pass computes each chunk's probabilities again; a single chunk's
    are kept.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        rows: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        w = weight.to(dtype)
        found, entropies, kept = [], [hidden.new_empty(0, dtype=torch.float32)], None
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            log_p = (h.to(dtype) @ w.T).float()  # (rows, V)
            log_p = log_p.sub_(log_p.logsumexp(dim=-1, keepdim=True))
            is_target = y != IGNORE_INDEX
            found.append(log_p.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1) * is_target)
            if entropy:
                entropies.append(-(log_p.exp().mul_(log_p)).sum(dim=-1) * is_target)
            if len(h) == len(hidden):
                kept = log_p
            del log_p  # before the next chunk's are allocated
        log_probs, entropies_of = torch.cat(found), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, kept)  # type: ignore[arg-type]
        ctx.mark_non_differentiable(entropies_of)
        ctx.dtype, ctx.rows = dtype, rows  # type: ignore[attr-defined]
        return log_probs, entropies_of

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, targets, kept = ctx.saved_tensors  # type: ignore[attr-defined]
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        dtype, rows = ctx.dtype, ctx.rows  # type: ignore[attr-defined]
        w = weight.to(dtype)
        # fp16 has neither the range of a scaled gradient nor that of a sum over rows; see above.
        scale = grad.abs().amax().clamp(min=1e-30) if dtype == torch.float16 and len(grad) else 1.0
        shrink = rows**0.5 if dtype == torch.float16 else 1.0
        grads = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        chunks = (x.split(rows) for x in (hidden, targets, grad * (targets != IGNORE_INDEX)))
        for h, y, g in zip(*chunks, strict=True):
            h = h.to(dtype)
            if kept is None:
                p = (h @ w.T).float()  # (rows, V)
                p.sub_(p.logsumexp(dim=-1, keepdim=True)).exp_()
            else:
                p = kept.exp()
            # one-hot - softmax, in the memory of the logits
            label = y.clamp(min=0).unsqueeze(1)  # (rows, 1); without a target, g is 0
            p.neg_().scatter_add_(1, label, torch.ones_like(label, dtype=p.dtype))
            d = p.mul_((g / scale).unsqueeze(1)).to(dtype)
            del p
            if need_hidden:
                grads.append((d @ w).float().mul_(scale).to(hidden.dtype))
            if grad_weight is not None:
                grad_weight.add_(d.T @ (h / shrink), alpha=shrink)
            del d
        grad_hidden = torch.cat(grads) if need_hidden else None
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


@overload
def token_log_probs(model: LanguageModel, batch: Batch, *, temperature: float = 1.0) -> Tensor: ...


@overload
def token_log_probs(
    model: LanguageModel, batch: Batch, *, entropy: Literal[True], temperature: float = 1.0
) -> tuple[Tensor, Tensor]: ...


def token_log_probs(
    model: LanguageModel, batch: Batch, *, entropy: bool = False, temperature: float = 1.0
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each target in nats, (B, T) fp32; 0 where there is no target.

    entropy: return also the entropy of each of these predictions, alike, without gradient.
    temperature: divides the logits, as in sampling.
    Positions without a target cost nothing, and the logits of a whole batch never exist.
    """
    hidden, weight, dtype = _before_head(model, batch)
    targets = batch.targets.flatten()
    at = None
    if not torch.compiler.is_compiling():  # a compiled graph is for one shape
        at = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, at), targets[at]
    if temperature != 1:
        hidden = hidden / temperature
    rows = chunk_rows(max(1, len(targets)), weight.shape[0], hidden.device)
    found = TargetLogProbs.apply(hidden, weight, targets, dtype, rows, entropy)

    def placed(x: Tensor) -> Tensor:
        if at is not None:
            x = x.new_zeros(batch.targets.numel()).index_copy(0, at, x)
        return x.view(batch.targets.shape)

    log_probs, entropies = found
    return (placed(log_probs), placed(entropies)) if entropy else placed(log_probs)


def classification_loss(model: Classifier, batch: Batch) -> Tensor:
    """Summed cross-entropy of the classes in nats, an fp32 scalar.

    targets (B, T): class numbers, usually one per row: at its last token, IGNORE_INDEX elsewhere.
    """
    hidden = hidden_states(model, batch)
    # Every position gets scores, so that shapes do not depend on the targets, as a compiled graph
    # requires. With few classes this costs little compared to the blocks.
    scores = model.score(hidden).flatten(0, 1).float()  # (N, classes)
    targets = batch.targets.flatten()
    return F.cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, reduction="sum")

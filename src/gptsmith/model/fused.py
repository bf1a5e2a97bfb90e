"""Norm, rotation and attention as single functions with backward passes of their own, for training
on a CPU without a compiler. There, each operation of PyTorch reads and writes all of its tensors;
written by hand, they take half as many (docs/log.md). Results are the same but for rounding.
A second derivative is refused, since what is saved counts as constant.

B batch, T time, H heads, D head size, C size of the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def applies(x: Tensor) -> bool:
    """Whether this file serves x: in training, on a CPU, neither compiled nor within a transform of
    torch.func, for which these functions have no rules."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, in fp32 or wider: x (..., C), weight (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        C, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        wide, w = x.to(dtype), weight.to(dtype)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(C).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, w, scale)
        ctx.weight_dtype = weight.dtype
        return (wide * scale).mul_(w).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, scale = ctx.saved_tensors
        C, wide, grad = x.shape[-1], x.to(w.dtype), grad.to(w.dtype)
        product = (grad * wide).reshape(-1, C)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # d(x_i * scale) / dx_j = scale * (i == j) - scale**3 / C * x_i * x_j
            along = (product @ w).view_as(scale).mul_(scale.square()).div_(-C)
            grad_x = (grad * w).addcmul_(wide, along).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (product.T @ scale.reshape(-1)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None


class Rotation(torch.autograd.Function):
    """`rope.rotate`: x (B, T, H, D), cos and sin (B|1, T, 1, D/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (B|1, T, 1, D)
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, _swapped(x), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, _swapped(grad), sin, value=-1), None, None


def _swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((b, a), dim=-1)


class CausalAttention(torch.autograd.Function):
    """Causal attention by matrix products, one block of queries at a time, without later keys.

    q, k, v (B, H, T, D). The probabilities, in the dtype of q, are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        out, weights = torch.empty_like(q), []
        for here, end in _blocks(T):
            later = torch.full((end - here.start, end), -torch.inf, dtype=q.dtype)
            later.triu_(here.start + 1)
            scores = torch.baddbmm(later, q[:, here], k[:, :end].mT, alpha=D**-0.5)
            weights.append(scores.softmax(dim=-1))  # (B * H, block, end)
            out[:, here] = weights[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, *weights)
        return out.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *weights = ctx.saved_tensors
        B, H, T, D = grad.shape
        grad, scale = grad.reshape(B * H, T, D), D**-0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (here, end), p in zip(_blocks(T), weights, strict=True):
            g = grad[:, here]
            grad_v[:, :end].baddbmm_(p.mT, g)
            s = torch.ops.aten._softmax_backward_data(g @ v[:, :end].mT, p, -1, p.dtype)
            s *= scale
            grad_q[:, here] = s @ k[:, :end]
            grad_k[:, :end].baddbmm_(s.mT, q[:, here])
        return tuple(x.view(B, H, T, D) for x in (grad_q, grad_k, grad_v))  # type: ignore[return-value]


def _blocks(T: int) -> list[tuple[slice, int]]:
    """The queries of each block, and the number of keys that the last of them attends to."""
    step = max(64, -(-T // 8))
    return [
        (slice(start, min(start + step, T)), min(start + step, T)) for start in range(0, T, step)
    ]

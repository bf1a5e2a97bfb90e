"""FP8 training: linear layers whose matrix products multiply 8-bit floating-point numbers.

Each operand is multiplied by a scale that takes its largest magnitude to the largest number of the
format, and rounded: e4m3 for activations and weights, e5m2, which has more range and less
precision, for gradients (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). There is one
scale per tensor and it is computed anew for each product, so a run has no state besides its fp32
weights. `torch._scaled_mm` multiplies and divides by both scales.

N rows (tokens), K inputs and M outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 16  # of which the sizes of a product must be multiples
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in an FP8 dtype, contiguous, and the scale, an fp32 scalar.

    The scale of a tensor of zeros is small and positive. A NaN or an infinity makes the product
    NaN, so that the step is skipped as in the other precisions.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-20) / largest
    # By rounding, x / scale may exceed `largest` a little, but not by the half unit at which the
    # conversion would overflow: no clamp is needed.
    return (x.float() / scale).to(dtype).contiguous(), scale


def columns(x: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, as the second operand of a product must be."""
    return x.T.contiguous().T


def multiply(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a @ b times both scales, in dtype. a: rows contiguous; b: columns contiguous.

    fast: sums have fewer bits, which is faster.
    """
    return torch._scaled_mm(a, b, *scales, out_dtype=dtype, use_fast_accum=fast)


class Fp8Product(torch.autograd.Function):
    """x (N, K) @ weight.T (K, M) in `dtype`; both products of the backward pass are in FP8 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = quantize(x, _E4M3)
        w8, w_scale = quantize(weight, _E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return multiply(x8, w8.T, (x_scale, w_scale), dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8, g_scale = quantize(grad, _E5M2)  # (N, M)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(g8, columns(w8), (g_scale, w_scale), x_dtype)
        if ctx.needs_input_grad[1]:
            rows = g8.T.contiguous()  # (M, N)
            grad_weight = multiply(rows, columns(x8), (g_scale, x_scale), w_dtype)
        return grad_x, grad_weight, None


class Fp8Linear(nn.Linear):
    """A linear layer that computes in FP8 while gradients are recorded, and else as any other."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.reshape(-1, self.in_features)  # (N, K)
        N = rows.shape[0]
        if spare := -N % MULTIPLE:  # N is summed over in the gradient of the weight
            rows = F.pad(rows, (0, 0, 0, spare))
        y: Tensor = Fp8Product.apply(rows, self.weight, dtype)
        y = y[:N].view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)


def use_fp8(model: nn.Module) -> None:
    """Let the linear layers of the model's blocks train in FP8, in place.

    A layer with a size that is no multiple of 16 stays as it is, as do embeddings and heads. The
    modules and parameters remain the same objects with the same names, so optimizer state,
    checkpoints and wrappers do not notice. Raises ValueError if no layer can be used.
    """
    linears = [
        module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]
    fitting = [m for m in linears if m.in_features % MULTIPLE == m.out_features % MULTIPLE == 0]
    if not fitting:
        raise ValueError(
            f"precision fp8 needs linear layers whose sizes are multiples of {MULTIPLE}, and this "
            "model has none: change model.n_embd, or use bf16"
        )
    for module in fitting:
        module.__class__ = Fp8Linear

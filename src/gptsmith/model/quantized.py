"""Frozen linear layers in 4 or 8 bits, beside which adapters are trained (QLoRA).

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". The numbers of a weight, row
by row, are divided into blocks of 64. A block has a scale in fp32 and a code for each number. nf4:
the scale is the largest magnitude, a code means one of 16 quantiles of the normal distribution
between -1 and 1 (4.5 bits a number). int8: a code is a whole number up to 127, times the scale
(8.5 bits). nf4 is that of bitsandbytes without double quantization: the same codes and values.

M outputs and N inputs of a layer, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.model.config import Quantization
from gptsmith.model.gpt import FusedLinear

BLOCK = 64
BYTES = {"nf4": BLOCK // 2, "int8": BLOCK}  # of the codes of a block

# Appendix E of the paper. It has a zero, and more values above it than below.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_PAIRS = [[NF4[byte >> 4], NF4[byte & 15]] for byte in range(256)]  # the two numbers of a byte

# Blocks that are converted at a time on a CPU. Their fp32 numbers stay in its cache.
_CHUNK = 1 << 11


def quantize(weight: Tensor, format: Quantization) -> tuple[Tensor, Tensor]:
    """Codes (n, bytes) uint8 and scales (n,) fp32 of a weight; its last block is padded with zeros.

    Of two codes that are equally near, the lower one in nf4 and the even one in int8. In a byte of
    nf4, the first number is in the high bits.
    """
    numbers = weight.detach().flatten()
    if spare := -len(numbers) % BLOCK:
        numbers = F.pad(numbers, (0, spare))
    codes, scales = zip(
        *(_quantize(blocks, format) for blocks in numbers.view(-1, BLOCK).split(16 * _CHUNK)),
        strict=True,
    )
    return torch.cat(codes), torch.cat(scales)


def _quantize(blocks: Tensor, format: Quantization) -> tuple[Tensor, Tensor]:
    blocks = blocks.float()
    largest = blocks.abs().amax(dim=1)
    inverse = 1 / largest.clamp(min=torch.finfo(torch.float32).tiny)  # a block may be zero
    scaled = blocks * inverse.unsqueeze(1)
    if format == "int8":
        codes = (127 * scaled).round().to(torch.int8)
        return codes.view(torch.uint8), largest / 127
    levels = torch.tensor(NF4, device=blocks.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], largest


def dequantize(
    codes: Tensor,
    scales: Tensor,
    pairs: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight (M, N): products of fp32 numbers, rounded to dtype. pairs (256, 2): the two
    numbers of each byte of nf4; None for int8."""

    def numbers(codes: Tensor) -> Tensor:
        if pairs is None:
            return codes.view(torch.int8).float()
        # A pair is looked up as one integer, which is faster.
        found = pairs.view(torch.int64).view(-1).index_select(0, codes.view(-1).int())
        return found.view(torch.float32).view(-1, BLOCK)

    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        weight = (numbers(codes) * scales.unsqueeze(1)).to(dtype)
    else:
        weight = torch.empty(len(codes), BLOCK, dtype=dtype)
        chunks = zip(codes.split(_CHUNK), scales.split(_CHUNK), weight.split(_CHUNK), strict=True)
        for some, scale, out in chunks:
            torch.mul(numbers(some), scale.unsqueeze(1), out=out)
    M, N = shape
    return weight.view(-1)[: M * N].view(M, N)


class QuantizedProduct(torch.autograd.Function):
    """x @ W.T + b in the dtype of x. For the backward pass codes are kept, not the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        pairs: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, pairs)
        ctx.shape = shape
        return F.linear(x, dequantize(codes, scales, pairs, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        codes, scales, pairs = ctx.saved_tensors
        weight = dequantize(codes, scales, pairs, ctx.shape, grad.dtype)
        return grad @ weight, None, None, None, None, None


class QuantizedLinear(nn.Module):
    """A frozen linear layer, whose weight (M, N) exists during a product only.

    It replaces `linear`, whose bias it takes; its own weight is undefined until `set_weight`, or
    until codes and scales are loaded.
    """

    def __init__(self, linear: nn.Linear, format: Quantization) -> None:
        super().__init__()
        M, N = linear.weight.shape
        self.out_features, self.in_features, self.format = M, N, format
        self.fused_rows = getattr(linear, "fused_rows", None)
        self.bias = linear.bias
        n, device = -(-M * N // BLOCK), linear.weight.device
        codes = torch.empty(n, BYTES[format], dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.empty(n, device=device))
        pairs = torch.tensor(_PAIRS, device=device) if format == "nf4" else None
        self.register_buffer("pairs", pairs, persistent=False)

    codes: Tensor
    scales: Tensor
    pairs: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight (M, N) in fp32, computed anew."""
        shape = self.out_features, self.in_features
        return dequantize(self.codes, self.scales, self.pairs, shape, torch.float32)

    def set_weight(self, weight: Tensor) -> None:
        self.codes, self.scales = quantize(weight, self.format)

    def forward(self, x: Tensor) -> Tensor:
        kind, bias = x.device.type, self.bias
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y: Tensor = QuantizedProduct.apply(
            x.to(dtype), None if bias is None else bias.detach().to(dtype),
            self.codes, self.scales, self.pairs, (self.out_features, self.in_features),
        )  # fmt: skip
        return y

    def dequantized(self) -> nn.Linear:
        """A plain layer with the same weight, in fp32."""
        N, M, bias = self.in_features, self.out_features, self.bias is not None
        with torch.device("meta"):
            rows = self.fused_rows
            linear = FusedLinear(N, rows, bias) if rows else nn.Linear(N, M, bias)
        linear.weight, linear.bias = nn.Parameter(self.weight), self.bias
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers of a model, by name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear))


def replace_linears(model: nn.Module, format: Quantization, with_weights: bool = True) -> None:
    """Quantize the linear layers of the model's blocks, in place. Embeddings and heads, of which
    rows may be trained, stay as they are. with_weights=False: the weights come later."""
    for name, linear in [*model.named_modules()]:
        if name.startswith("blocks.") and isinstance(linear, nn.Linear):
            layer = QuantizedLinear(linear, format)
            if with_weights:
                layer.set_weight(linear.weight)
            model.set_submodule(name, layer)


def restore_linears(model: nn.Module) -> None:
    """Replace quantized layers by plain ones with the same weights in fp32, in place."""
    for name, layer in [*quantized_layers(model)]:
        model.set_submodule(name, layer.dequantized())

"""Weights in the order in which the kernels read them, as they are or quantized.

M outputs (rows of a weight), N inputs, G groups of inputs that share a scale. Both sizes are padded
to multiples of 64. A tile is 16 outputs: for each 1, 2, 4 or 8 inputs (fp32, bf16, int8, int4) the
weights of output 0, then those of output 1, and so on: a vector holds 16 outputs.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels import native

TILE = 16
UNIT = 64  # sizes are multiples of it
GROUP = {"int8": 64, "int4": 32}  # inputs that share a scale
_CHUNK = 4096  # outputs packed at a time: conversions need memory


class PackedMatrix:
    """A weight (M, N) and its bias (M,), packed. ValueError for an unknown format.

    int8 has a scale per 64 inputs (8.25 bits a weight), int4 one per 32 (4.5 bits), in bf16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, format: str) -> None:
        if format not in native.FORMATS:
            raise ValueError(f"no weights {format!r}: choose one of {', '.join(native.FORMATS)}")
        self.shape, self.format = weight.shape, format
        M, N = (padded(n) for n in weight.shape)
        first = _packed(weight[:UNIT], N, format)
        self.data = _large_pages(first.numel() * (M // UNIT)).view(M // TILE, -1)
        for start in range(0, len(weight), _CHUNK):
            tiles = _packed(weight[start : start + _CHUNK], N, format)
            self.data[start // TILE : start // TILE + len(tiles)] = tiles
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, M - len(bias)))
        self.native = native.Matrix(
            self.data.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            native.FORMATS.index(format),
            M,
            N,
        )

    @property
    def nbytes(self) -> int:
        return self.data.numel() + (0 if self.bias is None else 4 * self.bias.numel())


def padded(size: int) -> int:
    return -(-size // UNIT) * UNIT


def _packed(weight: Tensor, N: int, format: str) -> Tensor:
    """Tiles (M / 16, bytes) of some rows of a weight."""
    M, inputs = weight.shape
    w = F.pad(weight.detach().float(), (0, N - inputs, 0, padded(M) - M))
    tiles = len(w) // TILE
    match format:
        case "float32":
            return _bytes(w.view(tiles, TILE, N).transpose(1, 2))
        case "bfloat16":
            return _bytes(w.bfloat16().view(tiles, TILE, N // 2, 2).transpose(1, 2))
        case "int8":
            q, scales = quantize(w, format)
            body = (q + 128).to(torch.uint8).view(tiles, TILE, N // 4, 4)
        case "int4":
            q, scales = quantize(w, format)
            pairs = (q + 8).to(torch.uint8).view(tiles, TILE, N // 8, 2, 4)
            body = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4  # (tiles, TILE, N / 8, 4)
        case _:
            raise AssertionError(format)
    front = _bytes(scales.view(tiles, TILE, -1).transpose(1, 2))
    front = F.pad(front, (0, -front.shape[1] % UNIT))
    return torch.cat([front, _bytes(body.transpose(1, 2))], dim=1)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).view(len(x), -1)


def quantize(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Whole numbers (M, N), fp32, and scales (M, G), bf16, of weights (M, N), fp32: w ~ q * scale.

    int8: -127..127, the largest magnitude of a group becomes 127. int4: -8..7; of several scales,
    among them those that make the largest magnitude -8 or 7, the one with the least squared error.
    """
    groups = w.view(len(w), -1, GROUP[format])  # (M, G, group)
    if format == "int8":
        scale = (groups.abs().amax(dim=2) / 127).bfloat16()
        return _rounded(groups, scale, -127, 127).view_as(w), scale
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))[..., 0]  # (M, G)
    best_scale = best_error = None
    for steps in (-8.0, 7.0, -8.6, 7.6, -9.2, 8.2, -7.4, -10.0):
        scale = (largest / steps).bfloat16()
        q = _rounded(groups, scale, -8, 7)
        error = (q * scale.float()[..., None] - groups).square().sum(dim=2)
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            best_scale, best_error = (
                scale.where(better, best_scale),
                error.where(better, best_error),
            )
    assert best_scale is not None
    return _rounded(groups, best_scale, -8, 7).view_as(w), best_scale


def _rounded(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (groups * inverse[..., None]).round_().clamp_(low, high)


def _large_pages(size: int) -> Tensor:
    """Bytes that the system may back with pages of 2 MiB, so that long reads miss fewer
    translations of addresses."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)

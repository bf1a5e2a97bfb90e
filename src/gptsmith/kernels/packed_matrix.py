"""Weights in the order in which the kernels read them, as they are or quantized.

M outputs (rows of a weight), N inputs. Both sizes are padded to multiples of 64. A tile is 16
outputs: for each 1, 2, 4 or 8 inputs (fp32, bf16, int8, int4) the weights of output 0, then those
of output 1, and so on: a vector holds 16 outputs.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels import native
from gptsmith.kernels.memory import allocate

UNIT = 64  # sizes are multiples of it
_BLOCK = 1 << 26  # bytes; what is not used of them takes no memory


class PackedMatrix:
    """A weight (M, N) and its bias (M,), packed.

    int8 has a scale per 64 inputs (8.25 bits a weight), int4 one per 32 (4.5 bits), in bf16.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: Memory,
        weight: Tensor,
        bias: Tensor | None,
        format: str,
    ) -> None:
        self.shape, self.format = weight.shape, format
        self._library = library
        M, N = (padded(n) for n in weight.shape)
        code = native.FORMATS.index(format)
        self.data = memory.take(library.packed_bytes(code, M, N))
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, M - len(bias)))
        address = None if self.bias is None else self.bias.data_ptr()
        self.native = native.Matrix(self.data.data_ptr(), address, code, M, N)
        weight = weight.detach().contiguous()
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.float()
        bf16 = weight.dtype == torch.bfloat16
        library.pack(native.runtime(), self.native, weight.data_ptr(), bf16, *weight.shape)

    @property
    def nbytes(self) -> int:
        return self.data.numel() + (0 if self.bias is None else 4 * self.bias.numel())

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b, (rows, M) in fp32, of x (rows, N), for weights in the library's format."""
        M, N = self.shape
        x = F.pad(x.float(), (0, padded(N) - N)).contiguous()
        y = torch.empty(len(x), padded(M))
        prepared = torch.empty(len(x), self._library.row_bytes(padded(N)) // 4)
        addresses = prepared.data_ptr(), y.data_ptr()
        self._library.product(native.runtime(), self.native, x.data_ptr(), len(x), *addresses)
        return y[:, :M]

    def weight(self) -> Tensor:
        """The weight (M, N) in fp32, as the kernels see it."""
        M, N = self.shape
        rows = torch.empty(M, padded(N))
        for i, row in enumerate(rows):
            self._library.unpack(self.native, i, row.data_ptr())
        return rows[:, :N]


def padded(size: int) -> int:
    return -(-size // UNIT) * UNIT


class Memory:
    """Memory for packed weights, in large blocks."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """`size` bytes of memory, a multiple of 64."""
        if size > len(self._block):
            self._block = allocate(max(size, _BLOCK))
        taken, self._block = self._block[:size], self._block[size:]
        return taken

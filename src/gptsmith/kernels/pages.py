"""Memory for keys and values in pages of 64 positions.

P pages, K key/value heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptsmith.kernels.memory import allocate
from gptsmith.kernels.native import PAGE
from gptsmith.model.config import ModelConfig


class Pages:
    """Memory for `count` pages, each for the keys and values of all layers at 64 consecutive
    positions of a sequence: pages[number] (n_layer, 2, K, 64 * D, padded). The caller decides which
    sequence uses which page."""

    def __init__(self, config: ModelConfig, count: int, dtype: torch.dtype) -> None:
        D = -(-config.D // 16) * 16  # padded
        self.dtype = dtype
        self._shape = (config.n_layer, 2, config.K, PAGE * D)
        self._pages: list[Tensor] = []
        self.addresses = torch.empty(0, dtype=torch.int64)
        """Of each page (P,)."""
        self.grow(count)

    def __len__(self) -> int:
        return len(self._pages)

    def __getitem__(self, number: int) -> Tensor:
        return self._pages[number]

    def grow(self, count: int) -> None:
        """Allocate memory for at least `count` pages; the others stay where they are."""
        P = len(self)
        if count > P:
            more = max(count - P, P)  # what is not used of it takes no memory
            memory = allocate(more * math.prod(self._shape) * self.dtype.itemsize)
            self._pages += memory.view(self.dtype).view(more, *self._shape).unbind()
            self.addresses = torch.tensor([page.data_ptr() for page in self._pages])

    def copy(self, source: int, target: int) -> None:
        """Replace the contents of page `target` by those of page `source`."""
        self[target].copy_(self[source])

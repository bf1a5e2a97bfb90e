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
    positions of a sequence. The caller decides which sequence uses which page."""

    def __init__(self, config: ModelConfig, count: int, dtype: torch.dtype) -> None:
        D = -(-config.D // 16) * 16  # padded
        self._shape, self._dtype = (config.n_layer, 2, config.K, PAGE * D), dtype
        self.data = self._zeros(count)

    def grow(self, count: int) -> None:
        """Allocate memory for at least `count` pages; stored keys and values are kept."""
        P = len(self.data)
        if count > P:
            more = self._zeros(max(count, 2 * P))
            more[:P] = self.data
            self.data = more

    def _zeros(self, count: int) -> Tensor:
        memory = allocate(count * math.prod(self._shape) * self._dtype.itemsize)
        return memory.view(self._dtype).view(count, *self._shape)

    def copy(self, source: int, target: int) -> None:
        """Replace the contents of page `target` by those of page `source`."""
        self.data[target] = self.data[source]

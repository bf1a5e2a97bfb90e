"""Rows that begin alike: what they share is computed once.

Under a causal mask, the vector of a position depends on the tokens up to it alone. So positions
with equal tokens up to them, such as the prompt of several answers, have one vector, and padding
needs none. Embedding, projections, norms and MLP compute each vector once. Attention sees whole
rows, and so its results are those of separate rows under every such mask.

B rows, T positions, N vectors that are computed, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptsmith.model.attention import Bias, attention, dense_bias
from gptsmith.model.checks import check_length
from gptsmith.model.masks import Mask

# Vectors are filled up to a multiple of this: fewer shapes, and beyond whole blocks, MKL's sums
# depend on the alignment of memory, so that two runs might round differently.
_MULTIPLE = 16


class SharedPrefixes:
    """Which positions of (B, T) have one vector, and attention for them, in place of a KV cache.

    same_as (B, T) int64: for each position, the number b * T + t of the one whose vector it has,
    which is its own number for those that are computed; -1: padding, at the end of a row.
    """

    def __init__(self, same_as: Tensor) -> None:
        self.shape = same_as.shape
        source = same_as.flatten()
        is_computed = source == torch.arange(len(source), device=source.device)
        computed = is_computed.nonzero().squeeze(1)
        self._used = len(computed)  # of the N; the others fill up to the next multiple
        fill = computed[:1].expand(-len(computed) % _MULTIPLE)
        self._computed = torch.cat([computed, fill])  # (N,)
        number = is_computed.cumsum(0) - 1
        # padding takes any vector: nothing attends to it, and what it attends to is not used
        self._vector = number[source.clamp(min=0)].clamp(min=0)  # (B * T,)
        self._copies = ((source >= 0) & ~is_computed).nonzero().squeeze(1)  # (M,)
        copied = self._vector[self._copies]
        self._copied, self._sum = copied.unique(return_inverse=True)  # those with copies; (M,)

    def select(self, x: Tensor) -> Tensor:
        """Of values (B, T) those of the positions that are computed, (1, N)."""
        return x.flatten()[self._computed][None]

    def expand(self, x: Tensor) -> Tensor:
        """Vectors (B, T, C) of all positions, from those that were computed, (1, N, C)."""
        index = self._computed, self._vector, self._copies, self._copied, self._sum
        rows: Tensor = _Expand.apply(x.flatten(0, 1), self._used, *index)
        return rows.view(*self.shape, -1)

    # What a forward pass of the model asks of a cache

    def next_positions(self, T: int) -> Tensor:
        """Positions (1, N) in their rows."""
        return (self._computed % self.shape[1])[None]

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Bias:
        """The mask of whole rows. ValueError if equal tokens do not mean equal vectors under it."""
        if not mask.shares_prefixes:
            raise ValueError(
                f"the mask {mask.expression} may show tokens later ones, or depend on the row: "
                "rows that begin alike cannot be computed as one"
            )
        B, T = self.shape
        check_length(T, limit)
        return dense_bias(mask, B, H, T, positions.device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Bias, dropout: float
    ) -> Tensor:
        """Attention of q (1, H, N, D) over k and v (1, K, N, D) in whole rows: (1, H, N, D)."""
        y = attention(self._rows(q), self._rows(k), self._rows(v), mask, dropout)  # (B, H, T, D)
        B, H, T, D = y.shape
        y = y.transpose(1, 2).reshape(B * T, H * D).index_select(0, self._computed)
        return y.view(1, -1, H, D).transpose(1, 2)

    def _rows(self, x: Tensor) -> Tensor:
        """(B, H, T, D) of x (1, H, N, D)."""
        _, H, N, D = x.shape
        rows = self.expand(x.transpose(1, 2).reshape(1, N, H * D))
        return rows.view(*self.shape, H, D).transpose(1, 2)


class _Expand(torch.autograd.Function):
    """x[vector]: (B * T, C) of x (N, C). The gradients of copies are added up in fp32, since a
    prompt may have many answers; those of padding are zero, and left out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        used: int,
        computed: Tensor,
        vector: Tensor,
        copies: Tensor,
        copied: Tensor,
        number: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(computed, copies, copied, number)
        ctx.used = used
        return x.index_select(0, vector)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        computed, copies, copied, number = ctx.saved_tensors
        found = grad.index_select(0, computed)
        found[ctx.used :] = 0
        if len(copies):
            total = found.index_select(0, copied).float()
            total.index_add_(0, number, grad.index_select(0, copies).float())
            found.index_copy_(0, copied, total.to(found.dtype))
        return found, None, None, None, None, None, None

"""Decoding from pages whose table is on the device: a pass that reads nothing on the host.

All that changes from token to token is in tensors that stay where they are, so a CUDA graph of the
pass can be replayed. Attention reads the pages in place, by FlashAttention (`varlen_attn`), or
copies those of each row side by side, by PyTorch's operations on any device and for any mask.

B rows, H query heads, K key/value heads, P pages, D head size, n pages of a row, S = n * page keys.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from gptsmith.model.attention import Bias, attention
from gptsmith.model.kv_cache import PagedKVCache
from gptsmith.model.masks import Mask

FLASH_PAGE = 256  # FlashAttention 2 reads pages of a multiple of this


class NewestTokens(NamedTuple):
    """The newest token of each row, whose keys and values are stored and attended to: int64."""

    positions: Tensor  # (B,)
    slots: Tensor  # (B,): page * size + offset, where the token is stored
    starts: Tensor  # (B,): position of the first token in the row's pages
    table: Tensor  # (B, n): pages of the row, in order; any page behind its last


class DecodeCache:
    """A cache in whose forward pass each of B rows reads one token; see model.kv_cache.Cache.

    pages: where keys and values are stored. They must not grow as long as this is in use.
    """

    def __init__(self, pages: PagedKVCache, newest: NewestTokens, mask: Mask) -> None:
        self.k, self.v = pages.k, pages.v  # (n_layer, K, P, page, D)
        self.newest = newest
        self.page = self.k.shape[3]
        served = flash_serves(self.k.dtype, self.k.shape[4], self.k.device)
        self._window = flash_window(mask) if served and self.page % FLASH_PAGE == 0 else None

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, 1) of the tokens, on the device."""
        assert T == 1
        return self.newest.positions.unsqueeze(1)

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Tensor | None:
        """What every layer needs; returns the keys that `attend` may use, (B, H|1, 1, S), or None
        if FlashAttention serves the mask."""
        _, K, P, page, _ = self.k.shape
        starts, table = self.newest.starts, self.newest.table
        B, n = table.shape
        if self._window is not None:
            self._lengths = (self.newest.positions - starts + 1).int()  # (B,)
            self._table = table.int()
            return None
        self._index = (
            table.unsqueeze(1) + torch.arange(K, device=table.device)[:, None] * P
        ).flatten()
        keys = starts.unsqueeze(1) + torch.arange(n * page, device=table.device)  # (B, S)
        return mask.dense(B, H, positions, keys.masked_fill(keys > positions, -1))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Bias, dropout: float
    ) -> Tensor:
        """Store k and v (B, K, 1, D) of a layer; returns what q (B, H, 1, D) reads."""
        for pool, new in ((self.k[layer], k), (self.v[layer], v)):
            flat = pool.view(pool.shape[0], -1, pool.shape[3])  # (K, P * page, D)
            flat.index_copy_(1, self.newest.slots, new.squeeze(2).transpose(0, 1))
        if self._window is not None:
            k, v = self.k[layer], self.v[layer]  # (K, P, page, D)
            return _flash(q, k, v, self._table, self._lengths, self._window)
        return attention(q, self._row(self.k[layer]), self._row(self.v[layer]), mask, dropout)

    def _row(self, pool: Tensor) -> Tensor:
        """The pages of each row side by side, (B, K, S, D)."""
        K, _, page, D = pool.shape
        found = pool.view(-1, page * D).index_select(0, self._index)  # (B * K * n, page * D)
        return found.view(-1, K, self.newest.table.shape[1] * page, D)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, window: tuple[int, int]
) -> Tensor:
    """What queries (B, H, 1, D) read of the first `lengths` (B,) keys and values (K, P, page, D) of
    the pages in their rows of the table (B, n), both int32: (B, H, 1, D)."""
    from torch.nn.attention.varlen import varlen_attn

    rows = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    S = table.shape[1] * k.shape[2]
    out = varlen_attn(
        q.squeeze(2),  # (B, H, D)
        k.permute(1, 2, 0, 3),  # (P, page, K, D)
        v.permute(1, 2, 0, 3),
        rows,
        rows * S,  # its shape is checked, its values give way to the lengths
        1,
        S,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[0],
        seqused_k=lengths,
        block_table=table,
        # More would leave rows unwritten (pytorch#194167), and make a row depend on others.
        num_splits=1,
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(2)


def flash_serves(dtype: torch.dtype, D: int, device: torch.device) -> bool:
    """Whether FlashAttention can read keys and values of this type and head size from pages."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and D % 8 == 0
        and D <= 256
        and _has_page_tables()
        and _flash_is_right(dtype, D, device)
    )


@cache
def _flash_is_right(dtype: torch.dtype, D: int, device: torch.device) -> bool:
    """Whether an example gives what it should. GPUs and builds without such a kernel raise an
    error, and some builds leave rows unwritten, silently."""
    with torch.inference_mode(False), torch.no_grad():
        numbers = torch.arange(8 * FLASH_PAGE * D, dtype=torch.float64)
        k, v, q = (numbers * step for step in (0.7, 1.3, 0.1))
        k, v = (x.sin().to(device, dtype).view(2, 4, FLASH_PAGE, D) for x in (k, v))  # K = 2
        q = q.sin().to(device, dtype)[: 3 * 4 * D].view(3, 4, 1, D)  # B = 3, H = 4
        table = torch.tensor([[2, 1], [3, 0], [0, 2]], dtype=torch.int32, device=device)
        lengths = torch.tensor([FLASH_PAGE + 44, 7, FLASH_PAGE], dtype=torch.int32, device=device)
        try:
            found = _flash(q, k, v, table, lengths, (299, 0))
        except RuntimeError:
            return False
        keys, values = (x[:, table.long()].transpose(0, 1).flatten(2, 3).float() for x in (k, v))
        at = torch.arange(2 * FLASH_PAGE, device=device)  # (S,)
        newest = lengths.long()[:, None] - 1  # (B, 1)
        mask = ((at <= newest) & (at > newest - 300))[:, None, None]  # (B, 1, 1, S)
        expected = attention(q.float(), keys, values, mask)
        return bool(((found.float() - expected).abs() < 0.02).all())  # False if not a number


@cache
def _has_page_tables() -> bool:
    """PyTorch 2.13 or later."""
    from torch.nn.attention import varlen

    return {"block_table", "num_splits"} <= set(signature(varlen.varlen_attn).parameters)


def flash_window(mask: Mask) -> tuple[int, int] | None:
    """How many keys before and behind a query FlashAttention must see under the mask, -1: all; None
    for masks that it does not know."""
    n = mask.causal_window
    if n == 0:
        return -1, -1  # a single query sees all that is stored
    return None if n is None else (n - 1, 0)

"""The KV cache: keys and values of the tokens read so far, so a new token costs one position.

`KVCache` has a row for each text; `PagedKVCache` has pages that texts may share (see
gptsmith.generate.pages).

B batch (rows), T new tokens, K key/value heads, S slots of a row, P pages, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptsmith.model.attention import Bias, attention
from gptsmith.model.config import ModelConfig
from gptsmith.model.masks import Mask


class Cache(Protocol):
    """What a forward pass of the model asks of a cache."""

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, T) of T more tokens in every row."""

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Bias:
        """The keys that tokens at these positions may see; called once."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Bias, dropout: float
    ) -> Tensor:
        """Store the new keys and values (B, K, T, D) of a layer, and return what the queries
        (B, H, T, D) read under the mask of `prepare`: (B, H, T, D)."""


class UpdatedCache(ABC):
    """A cache in which the queries attend to what `update` returns."""

    @abstractmethod
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) of one layer; returns those to attend to (B, K, S, D)."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Bias, dropout: float
    ) -> Tensor:
        """See Cache."""
        return attention(q, *self.update(layer, k, v), mask, dropout)


class KVCache(UpdatedCache):
    """Pre-allocated keys and values of every layer; each row has its own length.

    The token at position p of a row is stored in slot p % S. Under a sliding window, S may be as
    small as the window: a token is overwritten only when no later token can see it.

    A forward pass calls `prepare` once and `attend` in every layer. Rows with fewer new tokens than
    others are padded on the right with position -1; padding is neither stored nor seen.
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layer, batch, n_kv_head, capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (n_layer, B, K, S, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        # Positions and lengths stay on the host, so that `prepare` never waits for a GPU.
        self.positions = torch.full((batch, capacity), -1)  # (B, S), -1: empty
        self.lengths = [0] * batch
        """Number of tokens read in each row, which is its next position."""
        self._mask: Mask | None = None
        # `prepare` sets these once per pass; all layers use them.
        self._before = 0  # slots 0.._before - 1 were in use before this pass
        self._used = 0  # slots 0.._used - 1 are in use now
        self._slot: int | None = None  # where all rows store their single token, or else
        self._index: tuple[Tensor, Tensor, Tensor] | None = None  # (row, token) -> slot

    def __repr__(self) -> str:
        rows = f"{self.batch} rows of {self.capacity:,} slots, lengths {self.lengths}"
        return f"KVCache({len(self.k)} layers, {rows}, {self.k.dtype}, {self.k.device})"

    @classmethod
    def for_model(
        cls,
        config: ModelConfig,
        mask: Mask,
        batch: int,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache for texts of up to `max_length` tokens (default: the model's whole context)."""
        capacity = min(max_length or config.context_length, config.context_length)
        capacity = min(capacity, mask.window or capacity)
        return cls(config.n_layer, batch, config.K, config.D, capacity, dtype, device)

    @property
    def batch(self) -> int:
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, T) of T more tokens in every row, on the CPU."""
        return torch.tensor(self.lengths)[:, None] + torch.arange(T)

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Tensor | None:
        """Make room for tokens at `positions`, (B, T) or (T,), and return the keys they may see.

        Returns bools (B or 1, H or 1, T, S') that match the keys returned by `update`, or None: all
        keys if T is 1, causal otherwise. `limit`: the context length up to which the mask must be
        exact. ValueError if the cache cannot reproduce the full forward pass: the mask depends on
        the row, earlier tokens would have seen these later ones, a token that is still visible
        would be overwritten, or the positions do not continue the stored ones or leave the context.
        """
        positions, device = positions.cpu(), self.k.device
        last = int(positions.max())
        if last >= limit:
            raise ValueError(
                f"position {last} is outside context_length {limit}: keep only the newest "
                "tokens and fill the cache again"
            )
        stored = self.positions  # (B, S)
        B, S = stored.shape
        T = positions.shape[-1]
        positions = positions.expand(B, T)
        added = (positions >= 0).sum(dim=1).tolist()
        before = self.lengths
        self._check(positions, before, added, mask, H, limit)
        self._mask = mask
        self._before = min(max(before), S)
        previous = stored[:, : self._before]
        if T > 1:  # the new tokens may overwrite some that are still to be seen
            previous = previous.clone()  # (B, before)
        self.lengths = lengths = [n + m for n, m in zip(before, added, strict=True)]
        self._used = min(max(lengths), S)
        self._choose_slots(positions, lengths, added)
        aligned = min(lengths) == max(lengths)
        if T == 1:
            if mask.is_plain_causal and aligned:
                return None
            return mask.dense(B, H, positions.to(device), stored[:, : self._used].to(device))
        if self._before == 0 and mask.is_plain_causal:
            return None
        keys = torch.cat([previous, positions], dim=1).to(device)
        return mask.dense(B, H, positions.to(device), keys)

    def _check(
        self,
        positions: Tensor,
        lengths: list[int],
        added: list[int],
        mask: Mask,
        H: int,
        limit: int,
    ) -> None:
        next_positions = self.next_positions(positions.shape[1])
        if not positions.equal(next_positions.where(positions >= 0, -1)):
            raise ValueError(
                f"a cache of {lengths} tokens cannot continue at positions {positions.tolist()}:"
                " give each row its next positions, then -1 for padding"
            )
        if self._mask is not None and mask is not self._mask and any(self.lengths):
            raise ValueError(
                f"the cache was filled under the mask {self._mask.expression}, not under"
                f" {mask.expression}: create a new cache"
            )
        if mask.properties.uses_b:
            raise ValueError(
                f"no cache under the mask {mask.expression}: it depends on the row of the batch;"
                " use the full forward pass"
            )
        ahead = mask.lookahead(limit, H)
        for length, new in zip(lengths, added, strict=True):
            if length == 0 and 0 < new < ahead:
                raise ValueError(
                    f"no exact cache under the mask {mask.expression}: tokens up to position"
                    f" {ahead - 1} are seen by earlier ones, so the first {ahead} must be read in"
                    f" one pass, and {new} were; read more or use the full forward pass"
                )
            enough = mask.window or limit
            if length + new > self.capacity and self.capacity < enough:
                raise ValueError(
                    f"a cache of {self.capacity} tokens is too small for {length + new} under the"
                    f" mask {mask.expression}: {enough} are enough for any text"
                )

    def _choose_slots(self, positions: Tensor, lengths: list[int], added: list[int]) -> None:
        """Choose the slots of the new tokens; the newest S tokens of a row are kept."""
        S = self.capacity
        stored = self.positions
        self._slot = self._index = None
        if positions.shape[1] == 1 and min(lengths) == max(lengths) and all(added):
            self._slot = (lengths[0] - 1) % S
            stored[:, self._slot] = positions[:, 0]
            return
        oldest = torch.tensor(lengths)[:, None] - S
        row, token = ((positions >= 0) & (positions >= oldest)).nonzero(as_tuple=True)
        kept = positions[row, token]
        stored[row, kept % S] = kept
        device = self.k.device
        self._index = row.to(device), token.to(device), (kept % S).to(device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) of one layer; returns the keys and values to attend to.

        Returns k and v (B, K, S', D) that match the mask of `prepare`. One token: everything stored
        including itself. More: what was stored before and then the new ones, because a window may
        be shorter than they are.
        """
        if k.dtype != self.k.dtype:
            raise ValueError(
                f"a cache of {self.k.dtype} got keys of {k.dtype}: create it with dtype={k.dtype}"
            )
        stored_k, stored_v = self.k[layer], self.v[layer]  # (B, K, S, D)
        one = k.shape[2] == 1
        if not one and self._before:
            all_k = torch.cat([stored_k[:, :, : self._before], k], dim=2)
            all_v = torch.cat([stored_v[:, :, : self._before], v], dim=2)
        else:
            all_k, all_v = k, v
        if self._slot is not None:
            stored_k[:, :, self._slot] = k[:, :, 0].detach()
            stored_v[:, :, self._slot] = v[:, :, 0].detach()
        else:
            assert self._index is not None
            row, token, slot = self._index
            stored_k[row, :, slot] = k[row, :, token].detach()
            stored_v[row, :, slot] = v[row, :, token].detach()
        if one:
            return stored_k[:, :, : self._used], stored_v[:, :, : self._used]
        return all_k, all_v


class Part(Protocol):
    """What a forward pass reads of a text, and where its keys and values are."""

    @property
    def start(self) -> int:
        """Position of the first token to read."""

    @property
    def stop(self) -> int: ...

    @property
    def pages(self) -> Sequence[int]:
        """pages[i] holds the positions from (first + i) * page on."""

    @property
    def first(self) -> int: ...


class PagedKVCache(UpdatedCache):
    """Keys and values of every layer in pages of a few consecutive tokens of a text.

    Before a forward pass, `use` says which texts it reads, one in each row; `prepare` and `attend`
    are as in KVCache, except that they check nothing. This is the path of torch's own ops: it
    copies the pages of each row side by side in every layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        page: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, config.K, 0, page, config.D)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (n_layer, K, P, page, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def __repr__(self) -> str:
        n_layer, _, P, page, _ = self.k.shape
        pages = f"{P} pages of {page} tokens"
        return f"PagedKVCache({n_layer} layers, {pages}, {self.k.dtype}, {self.k.device})"

    def grow(self, pages: int) -> None:
        """Make room for this many pages, and for more; what is stored stays. The last page never
        holds a text: rows that only pad a batch are stored there."""
        n_layer, K, P, page, D = self.k.shape
        if pages + 1 > P:
            more = (n_layer, K, max(pages + 1, 2 * P) - P, page, D)
            self.k = torch.cat([self.k, self.k.new_zeros(more)], dim=2)
            self.v = torch.cat([self.v, self.v.new_zeros(more)], dim=2)

    def copy(self, source: int, target: int) -> None:
        """Copy a page over another."""
        for pool in (self.k, self.v):
            pool[:, :, target] = pool[:, :, source]

    def use(self, parts: Sequence[Part]) -> None:
        """Row i of the next forward pass reads parts[i]."""
        self._parts = parts

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, T) of the tokens to read, -1 behind them, on the CPU."""
        start = torch.tensor([[part.start] for part in self._parts])
        stop = torch.tensor([[part.stop] for part in self._parts])
        positions = start + torch.arange(T)
        return positions.masked_fill(positions >= stop, -1)

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Tensor | None:
        """The keys that tokens at `positions` (B, T) may see, as in KVCache.prepare."""
        _, K, P, page, _ = self.k.shape
        parts, (B, T) = self._parts, positions.shape
        positions, device = positions.cpu(), self.k.device  # nothing here waits for a GPU
        n = max(len(part.pages) for part in parts)
        padded = [[*part.pages, *[0] * (n - len(part.pages))] for part in parts]
        table = torch.tensor(padded)  # (B, n)
        first = torch.tensor([[part.first] for part in parts])  # (B, 1)
        row, token = (positions >= 0).nonzero(as_tuple=True)
        at = positions[row, token]
        self._new = row.to(device), token.to(device)
        self._slots = (table[row, at // page - first[row, 0]] * page + at % page).to(device)
        heads = torch.arange(K)[:, None] * P
        index = (table[:, None] + heads).flatten()  # (B * K * n,) rows of k as (K * P, ...)
        self._index = index.to(device)
        lengths = [part.stop - part.first * page for part in parts]
        self._used = max(lengths)
        self._alone = T > 1 and mask.is_plain_causal and not any(part.start for part in parts)
        if self._alone or (T == 1 and mask.is_plain_causal and min(lengths) == self._used):
            return None
        keys = first * page + torch.arange(self._used)  # (B, S)
        keys = keys.masked_fill(keys >= torch.tensor([[part.stop] for part in parts]), -1)
        return mask.dense(B, H, positions.to(device), keys.to(device))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) of one layer; returns all keys and values (B, K, S, D) of the
        rows, from their first page on."""
        row, token = self._new
        found = []
        for pool, new in ((self.k[layer], k), (self.v[layer], v)):
            K, P, page, D = pool.shape
            pool.view(K, P * page, D)[:, self._slots] = new[row, :, token].transpose(0, 1)
            if not self._alone:
                pages = pool.view(K * P, page * D).index_select(0, self._index)
                found.append(pages.view(len(new), K, -1, D)[:, :, : self._used])
        return (k, v) if self._alone else (found[0], found[1])

"""Keys and values of the tokens a model has read, so that each new token costs one position.

B batch, T new tokens, K key/value heads, S slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.model.masks import Mask


class KVCache:
    """Pre-allocated keys and values of every layer, with their own length in every row.

    The token at position p of a row lies in slot p % S. Where the mask is a sliding window, S may
    be as small as the window: older tokens are overwritten when nobody can see them any more.

    A forward pass calls `begin` once and `update` in every layer. Rows of different lengths are
    padded on the right with position -1: padding is neither stored nor seen.
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
        self.positions = torch.full((batch, capacity), -1, device=device)  # (B, S), -1: empty
        self.lengths = [0] * batch
        """Tokens read so far, that is the next position, of every row."""
        self._mask: Mask | None = None
        # What `begin` decides for the `update` of every layer:
        self._old = 0  # slots 0.._old - 1 were in use before
        self._used = 0  # slots 0.._used - 1 are in use now
        self._slot: int | None = None  # the one slot that the token of every row goes to, or else
        self._index: tuple[Tensor, Tensor, Tensor] | None = None  # where from (row, token), to slot

    @classmethod
    def for_model(
        cls,
        config: ModelConfig,
        mask: Mask,
        batch: int,
        longest: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache for sequences of up to `longest` tokens (default: the model's whole context)."""
        capacity = min(longest or config.context_length, config.context_length)
        if mask.window is not None:
            capacity = min(capacity, mask.window)
        return cls(config.n_layer, batch, config.K, config.D, capacity, dtype, device)

    @property
    def batch(self) -> int:
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, T) of T more tokens in every row."""
        device = self.positions.device
        start = torch.tensor(self.lengths, device=device)[:, None]
        return start + torch.arange(T, device=device)

    def begin(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Tensor | None:
        """Make room for tokens at `positions`, (B, T) or (T,), and say which keys they see.

        Returns bools (B or 1, H or 1, T, S') that fit the keys `update` will return, or None: all
        of them if T is 1, else causal. `limit` is the context length up to which the mask must be
        exact. ValueError if the cache cannot give what the full forward pass gives: the mask
        depends on the row, tokens that were read before others see these later ones, a token that
        is still visible would be overwritten, or positions do not follow those stored.
        """
        B, S = self.positions.shape
        T = positions.shape[-1]
        positions = positions.expand(B, T)
        added = (positions >= 0).sum(dim=1).tolist()
        self._check(positions, added, mask, H, limit)
        self._mask = mask
        before = self.positions[:, : self._used].clone()  # (B, used)
        self._old = self._used
        self.lengths = [n + m for n, m in zip(self.lengths, added, strict=True)]
        self._used = min(max(self.lengths), S)
        self._place(positions, added)
        if T == 1:
            if mask.is_plain_causal and min(self.lengths) == max(self.lengths):
                return None
            return mask.dense(B, H, positions, self.positions[:, : self._used])
        if self._old == 0 and mask.is_plain_causal:
            return None
        return mask.dense(B, H, positions, torch.cat([before, positions], dim=1))

    def _check(self, positions: Tensor, added: list[int], mask: Mask, H: int, limit: int) -> None:
        next_positions = self.next_positions(positions.shape[1])
        if not positions.equal(next_positions.where(positions >= 0, -1)):
            raise ValueError(
                f"a cache that holds {self.lengths} tokens cannot go on at positions"
                f" {positions.tolist()}: give each row its next ones, then -1 for padding"
            )
        if self._mask is not None and mask is not self._mask and any(self.lengths):
            raise ValueError(
                f"the cache was filled under the mask {self._mask.expression}, not under"
                f" {mask.expression}: take a new cache"
            )
        if mask.facts.uses_b:
            raise ValueError(
                f"no cache under the mask {mask.expression}: it depends on the row of the batch;"
                " use the full forward pass"
            )
        ahead = mask.lookahead(limit, H)
        for length, new in zip(self.lengths, added, strict=True):
            if length == 0 and 0 < new < ahead:
                raise ValueError(
                    f"no exact cache under the mask {mask.expression}: up to position {ahead - 1}"
                    f" tokens are seen by earlier ones, so the first {ahead} must be read in one"
                    f" pass, and {new} were; read more or use the full forward pass"
                )
            enough = mask.window or limit
            if length + new > self.capacity and self.capacity < enough:
                raise ValueError(
                    f"a cache of {self.capacity} tokens is too small for {length + new} under the"
                    f" mask {mask.expression}: {enough} suffice for any text"
                )

    def _place(self, positions: Tensor, added: list[int]) -> None:
        """Note where the new tokens go; of more than a ring holds, the newest stay."""
        S = self.capacity
        self._slot = self._index = None
        if positions.shape[1] == 1 and min(self.lengths) == max(self.lengths) and all(added):
            self._slot = (self.lengths[0] - 1) % S
            self.positions[:, self._slot] = positions[:, 0]
            return
        oldest = torch.tensor(self.lengths, device=positions.device)[:, None] - S
        row, token = ((positions >= 0) & (positions >= oldest)).nonzero(as_tuple=True)
        kept = positions[row, token]
        self._index = row, token, kept % S
        self.positions[row, kept % S] = kept

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) of one layer; returns those that `begin` promised.

        Returns k and v (B, K, S', D). One token: what is stored, itself included. More: what was
        stored before, then themselves, because a ring may be shorter than they are.
        """
        if k.dtype != self.k.dtype:
            raise ValueError(f"a cache of {self.k.dtype} got keys of {k.dtype}: make it of those")
        stored_k, stored_v = self.k[layer], self.v[layer]  # (B, K, S, D)
        one = k.shape[2] == 1
        if not one and self._old:
            all_k = torch.cat([stored_k[:, :, : self._old], k], dim=2)
            all_v = torch.cat([stored_v[:, :, : self._old], v], dim=2)
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

    def put(self, rows: list[int], other: KVCache) -> None:
        """Replace some rows by those of another cache of the same capacity."""
        assert other.capacity == self.capacity
        self.k[:, rows], self.v[:, rows] = other.k, other.v
        self.positions[rows] = other.positions
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length
        self._mask = other._mask
        self._used = min(max(self.lengths), self.capacity)

    def reset(self, row: int) -> None:
        """Forget what a row has read."""
        self.positions[row] = -1
        self.lengths[row] = 0
        self._used = min(max(self.lengths), self.capacity)

    def drop(self, row: int) -> None:
        """Take a row out of the batch; the last row moves into its place."""
        last = self.batch - 1
        if row != last:
            self.k[:, row], self.v[:, row] = self.k[:, last], self.v[:, last]
            self.positions[row], self.lengths[row] = self.positions[last], self.lengths[last]
        self.k, self.v, self.positions = self.k[:, :last], self.v[:, :last], self.positions[:last]
        self.lengths.pop()
        self._used = min(max(self.lengths, default=0), self.capacity)

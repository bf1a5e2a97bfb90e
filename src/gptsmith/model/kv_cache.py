"""The KV cache: keys and values of the tokens a model has read, so a new token costs one position.

B batch (rows), T new tokens, K key/value heads, S slots of a row, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.model.masks import Mask


class KVCache:
    """Pre-allocated keys and values of every layer; each row has its own length.

    The token at position p of a row is stored in slot p % S. Under a sliding window, S may be as
    small as the window: a token is overwritten only when no later token can see it.

    A forward pass calls `prepare` once and `update` in every layer, for the rows that `use_rows`
    has selected (at first all of them). Rows with fewer new tokens than others are padded on the
    right with position -1; padding is neither stored nor seen. Between forward passes, rows can be
    truncated, copied and swapped, and the cache can grow.
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
        """Number of tokens read in each row, which is its next position."""
        self._rows = slice(0, batch)
        self._mask: Mask | None = None
        # Set by `prepare` for the `update` of every layer:
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
        capacity = cls.capacity_for(config, mask, max_length or config.context_length)
        return cls(config.n_layer, batch, config.K, config.D, capacity, dtype, device)

    @staticmethod
    def capacity_for(config: ModelConfig, mask: Mask, max_length: int) -> int:
        """Slots that texts of up to `max_length` tokens need in each row."""
        return min(max_length, config.context_length, mask.window or config.context_length)

    @property
    def batch(self) -> int:
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, T) of T more tokens in every selected row."""
        device = self.positions.device
        start = torch.tensor(self.lengths[self._rows], device=device)[:, None]
        return start + torch.arange(T, device=device)

    # A forward pass

    def use_rows(self, start: int, stop: int) -> None:
        """Select rows start..stop - 1 for the following forward passes: row i of their input is row
        start + i of the cache."""
        self._rows = slice(start, stop)

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Tensor | None:
        """Make room for tokens at `positions`, (B, T) or (T,), and return the keys they may see.

        Returns bools (B or 1, H or 1, T, S') that match the keys returned by `update`, or None: all
        keys if T is 1, causal otherwise. `limit`: the context length up to which the mask must be
        exact. ValueError if the cache cannot reproduce the full forward pass: the mask depends on
        the row, earlier tokens would have seen these later ones, a token that is still visible
        would be overwritten, or the positions do not continue the stored ones or leave the context.
        """
        last = int(positions.max())
        if last >= limit:
            raise ValueError(
                f"position {last} is outside context_length {limit}: keep only the newest "
                "tokens and fill the cache again"
            )
        stored = self.positions[self._rows]  # (B, S)
        B, S = stored.shape
        T = positions.shape[-1]
        positions = positions.expand(B, T)
        added = (positions >= 0).sum(dim=1).tolist()
        before = self.lengths[self._rows]
        self._check(positions, before, added, mask, H, limit)
        self._mask = mask
        self._before = min(max(before), S)
        previous = stored[:, : self._before]
        if T > 1:  # the new tokens may overwrite some that are still to be seen
            previous = previous.clone()  # (B, before)
        lengths = [n + m for n, m in zip(before, added, strict=True)]
        self.lengths[self._rows] = lengths
        self._used = min(max(lengths), S)
        self._place(positions, lengths, added)
        aligned = min(lengths) == max(lengths)
        if T == 1:
            if mask.is_plain_causal and aligned:
                return None
            return mask.dense(B, H, positions, stored[:, : self._used])
        if self._before == 0 and mask.is_plain_causal:
            return None
        return mask.dense(B, H, positions, torch.cat([previous, positions], dim=1))

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
        if mask.facts.uses_b:
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

    def _place(self, positions: Tensor, lengths: list[int], added: list[int]) -> None:
        """Choose the slots of the new tokens; the newest S tokens of a row are kept."""
        S = self.capacity
        stored = self.positions[self._rows]
        self._slot = self._index = None
        if positions.shape[1] == 1 and min(lengths) == max(lengths) and all(added):
            self._slot = (lengths[0] - 1) % S
            stored[:, self._slot] = positions[:, 0]
            return
        oldest = torch.tensor(lengths, device=positions.device)[:, None] - S
        row, token = ((positions >= 0) & (positions >= oldest)).nonzero(as_tuple=True)
        kept = positions[row, token]
        self._index = row, token, kept % S
        stored[row, kept % S] = kept

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
        stored_k, stored_v = self.k[layer, self._rows], self.v[layer, self._rows]  # (B, K, S, D)
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

    # Between forward passes

    def reusable_length(self, row: int, length: int) -> int:
        """How many of the first `length` tokens of a row another continuation can build on: all of
        them, or 0 if some that it would see have been overwritten."""
        read = self.lengths[row]
        length = min(length, read)
        if read < self.capacity:  # nothing was overwritten
            return length
        held = [position for position in self.positions[row].tolist() if position >= 0]
        oldest_visible = max(0, length - self.capacity + 1)
        return length if min(held, default=read) <= oldest_visible else 0

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row."""
        assert length == 0 or length == self.reusable_length(row, length)
        positions = self.positions[row]
        positions[positions >= length] = -1
        self.lengths[row] = length

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Replace row `target` by the first `length` tokens of row `source`."""
        wrapped = self.lengths[source] > self.capacity
        slots = slice(0, self.capacity if wrapped else length)
        self.k[:, target, :, slots] = self.k[:, source, :, slots]
        self.v[:, target, :, slots] = self.v[:, source, :, slots]
        self.positions[target] = self.positions[source]
        self.lengths[target] = self.lengths[source]
        self.truncate(target, length)

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        slots = slice(0, min(max(self.lengths[a], self.lengths[b]), self.capacity))
        for tensor in (self.k, self.v):
            tensor[:, [a, b], :, slots] = tensor[:, [b, a], :, slots]
        self.positions[[a, b]] = self.positions[[b, a]]
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def grow(self, batch: int, capacity: int) -> None:
        """Make room for at least `batch` rows of `capacity` slots; the stored tokens stay."""
        B, S = self.batch, self.capacity
        batch, capacity = max(batch, B), max(capacity, S)
        if (batch, capacity) == (B, S):
            return
        assert capacity == S or max(self.lengths, default=0) <= S  # else tokens would change slots
        n_layer, _, K, _, D = self.k.shape
        shape = (n_layer, batch, K, capacity, D)
        k, v, positions = self.k, self.v, self.positions
        self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.k[:, :B, :, :S], self.v[:, :B, :, :S] = k, v
        self.positions = positions.new_full((batch, capacity), -1)
        self.positions[:B, :S] = positions
        self.lengths += [0] * (batch - B)
        self._rows = slice(0, batch)

"""Keys and values in pages of 64 positions, and the cache of the model's own code on top of them.

B rows, T tokens, S keys, K key/value heads, D head size; P pages, n pages of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels.native import PAGE
from gptsmith.model.config import ModelConfig
from gptsmith.model.kv_cache import KVCache
from gptsmith.model.masks import Mask


class Pages:
    """Memory for `count` pages. Each holds keys and values of all layers for 64 positions of a
    text; who uses which page is the caller's business."""

    def __init__(
        self,
        config: ModelConfig,
        count: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.D = config.D
        self.padded = -(-config.D // 16) * 16
        shape = (count, config.n_layer, 2, config.K, PAGE * self.padded)
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def count(self) -> int:
        return len(self.data)

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory of one page."""
        numbers = config.n_layer * 2 * config.K * PAGE * -(-config.D // 16) * 16
        return numbers * dtype.itemsize

    def grow(self, count: int) -> None:
        """Make room for this many pages, and for more; what is stored stays."""
        P = len(self.data)
        if count > P:
            more = self.data.new_zeros(max(count, 2 * P) - P, *self.data.shape[1:])
            self.data = torch.cat([self.data, more])

    def copy(self, source: int, target: int) -> None:
        """Replace the contents of page `target` by those of page `source`."""
        self.data[target] = self.data[source]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (P, K, D, 64) and values (P, K, 64, D) of one layer, views with D padded to 16."""
        P, _, _, K, _ = self.data.shape
        k, v = self.data[:, layer, 0], self.data[:, layer, 1]
        return k.view(P, K, self.padded, PAGE), v.view(P, K, PAGE, self.padded)


class PagedCache(KVCache):
    """What GPTModel.hidden takes as cache, for one pass over rows that begin anywhere.

    tables (B, n): the pages of each row.
    """

    def __init__(self, pages: Pages, tables: Tensor) -> None:
        self.pages, self.tables = pages, tables.long().clamp(min=0)

    def prepare(self, positions: Tensor, mask: Mask, H: int, limit: int) -> Tensor:
        """The keys that tokens at positions (B, T), -1: padding, may see: (B|1, H|1, T, S)."""
        lengths = positions.amax(dim=1) + 1  # (B,)
        n = -(-int(lengths.max()) // PAGE)
        self.tables = self.tables[:, :n]
        self._row, self._token = (positions >= 0).nonzero(as_tuple=True)
        at = positions[self._row, self._token]
        self._page, self._offset = self.tables[self._row, at // PAGE], at % PAGE
        keys = torch.arange(n * PAGE, device=positions.device)  # (S,)
        keys = keys.where(keys < lengths[:, None], -1)  # (B, S)
        return mask.dense(len(positions), H, positions, keys)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D); returns all keys and values (B, K, S, D) of the rows."""
        D = self.pages.D
        keys, values = self.pages.layer(layer)
        dtype = keys.dtype
        new = self._row, self._token
        keys[self._page, :, :D, self._offset] = k.transpose(1, 2)[new].to(dtype)  # (tokens, K, D)
        values[self._page, :, self._offset, :D] = v.transpose(1, 2)[new].to(dtype)
        all_k = keys[self.tables].permute(0, 2, 1, 4, 3).flatten(2, 3)  # (B, K, S, D)
        all_v = values[self.tables].transpose(1, 2).flatten(2, 3)
        return all_k[..., :D].to(k.dtype), all_v[..., :D].to(v.dtype)


def padded_rows(
    ids: Tensor, rows: Tensor, positions: Tensor, tables: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a flat batch of N tokens, a rectangular one: ids and positions (B, T) padded on the right
    (positions -1), the tables of its rows, and where in it the N tokens are (N,)."""
    kept, row = rows.unique_consecutive(return_inverse=True)  # (B,), (N,)
    counts = row.bincount()
    B, T = len(counts), int(counts.max())
    first = F.pad(counts.cumsum(0), (1, -1))  # of each row
    where = row * T + torch.arange(len(ids), device=ids.device) - first[row]
    padded_ids, padded_positions = ids.new_zeros(B * T), positions.new_full((B * T,), -1)
    padded_ids[where], padded_positions[where] = ids, positions
    return padded_ids.view(B, T), padded_positions.view(B, T), tables[kept], where

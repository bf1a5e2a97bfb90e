"""Which positions of a batch have the same tokens up to them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Share of positions to compute above which gathering copies costs more than it saves: a guess.
_WORTH = 0.9


def same_prefixes(inputs: np.ndarray, lengths: np.ndarray) -> Tensor | None:
    """For each position of rows (B, T), the number b * T + t of the position that stands for all
    with the same tokens up to it, itself included, (B, T) int64; -1 behind the `lengths` (B,).

    None if nearly all positions differ.
    """
    B, T = inputs.shape
    at = np.arange(T)
    is_token = at < lengths[:, None]  # (B, T)
    ids = np.where(is_token, inputs, -1)
    order = np.lexsort(ids.T[::-1])  # by their tokens: rows that begin alike are adjacent
    begins_alike = np.logical_and.accumulate(ids[order[1:]] == ids[order[:-1]], axis=1)
    row = np.arange(B)[:, None].repeat(T, axis=1)
    row[1:][begins_alike] = 0
    first = order[np.maximum.accumulate(row, axis=0)]  # (B, T) rows, in sorted order
    found = np.empty((B, T), np.int64)
    found[order] = first * T + at
    found[~is_token] = -1
    computed = np.count_nonzero(found == np.arange(B * T).reshape(B, T))
    return torch.from_numpy(found) if computed <= _WORTH * B * T else None

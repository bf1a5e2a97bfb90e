"""Target leakage: whether a position can see its own target through the attention mask.

T time, H heads, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptsmith.model.masks import Mask

_MAX_POSITIONS = 4096  # for which following all paths takes half a minute and 0.3 GB


def first_target(mask: Mask, T: int, H: int, n_layer: int) -> int:
    """The first position whose next-token prediction is valid: 0 if the mask is causal,
    n - 1 for prefix(n).

    After L layers, information flows along paths of L hops, so the mask's L-th boolean power
    decides, not the mask itself. The positions that reach their own target must be the first ones
    (a prefix, whose targets are then masked); otherwise ValueError names the first other one.
    """
    if mask.properties.uses_b:
        raise ValueError(
            f"mask {mask.expression!r} depends on the row of the batch, so a text would be trained "
            "differently from row to row; use h, q and k only"
        )
    # No earlier position attends to positions from `ahead` on, so only paths among the first
    # `ahead` positions matter.
    ahead = mask.lookahead(T, H)
    if ahead == 0:
        return 0
    leaks = _attends_to_next(
        mask, ahead, H
    )  # (ahead - 1,): position t reaches its target, token t + 1
    if not bool(leaks.all()):
        leaks = _reaches_next(mask, ahead, H, n_layer)
    leaks = torch.cat([leaks, torch.zeros(T - ahead, dtype=torch.bool)])  # (T - 1,)
    first = int((~leaks).int().argmax()) if not bool(leaks.all()) else T
    if bool(leaks[first:].any()) or first == T:
        bad = first + int(leaks[first:].int().argmax()) if first < T else 0
        raise ValueError(
            f"mask {mask.expression!r}: position {bad} can see token {bad + 1}, its own "
            "target; next-token loss needs a causal mask, or prefix(n) shorter than "
            f"the context, here {T}"
        )
    return first


def _attends_to_next(mask: Mask, T: int, H: int) -> Tensor:
    """Which of the positions 0..T-2 attend to the next one in some head."""
    q = torch.arange(T - 1).view(1, 1, -1, 1)
    seen = mask(torch.zeros(1, 1, 1, 1).long(), torch.arange(H).view(1, H, 1, 1), q, q + 1)
    return seen.expand(1, H, T - 1, 1).any(dim=1).flatten()


def _reaches_next(mask: Mask, T: int, H: int, n_layer: int) -> Tensor:
    """Which of the positions 0..T-2 receive information about the next one in n_layer layers."""
    if T > _MAX_POSITIONS:
        raise ValueError(
            f"mask {mask.expression!r} looks ahead over {T} positions, and whether positions see "
            f"their targets is checked over {_MAX_POSITIONS}: take a shorter context_length, or a "
            "causal mask"
        )
    at = torch.arange(T)
    one = mask.dense(1, H, at, at).expand(1, H, T, T)[0].any(dim=0) | torch.eye(T, dtype=torch.bool)
    reach, power, left = torch.eye(T), one.float(), n_layer  # (T, T), by repeated squaring
    while left:
        if left & 1:
            reach = ((reach @ power) > 0).float()
        power, left = ((power @ power) > 0).float(), left >> 1
    return reach.diagonal(1) > 0

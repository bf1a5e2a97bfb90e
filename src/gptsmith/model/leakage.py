"""May a position be scored on its next token, or can it see that token through the mask?

T time, L layers.
"""

from __future__ import annotations

import torch

from gptsmith.model.masks import Mask


def first_scored(mask: Mask, T: int, H: int, n_layer: int) -> int:
    """The first position that next-token loss may score: 0 inside causal, n - 1 for prefix(n).

    What a position knows after L layers is everything that it reaches in L hops, so the mask's
    L-th boolean power decides, not the mask. Positions that reach their own target must be a run
    from 0 (a prefix, which is then not scored).

    Raises ValueError naming the first offending position otherwise.
    """
    if mask.facts.uses_b:
        raise ValueError(
            f"mask {mask.expression!r} depends on the row of the batch, so a text would be trained "
            "differently from row to row; use h, q and k only"
        )
    if mask.lookahead(T, H) == 0:
        return 0
    at = torch.arange(T)
    one = mask.dense(1, H, at, at).expand(1, H, T, T)[0].any(dim=0) | torch.eye(T, dtype=torch.bool)
    reach, power, left = torch.eye(T), one.float(), n_layer  # (T, T), by repeated squaring
    while left:
        if left & 1:
            reach = ((reach @ power) > 0).float()
        power, left = ((power @ power) > 0).float(), left >> 1
    leaks = reach.diagonal(1) > 0  # (T - 1,): position t reaches its target, token t + 1
    first = int((~leaks).int().argmax()) if not bool(leaks.all()) else T
    if bool(leaks[first:].any()) or first == T:
        bad = first + int(leaks[first:].int().argmax()) if first < T else 0
        raise ValueError(
            f"mask {mask.expression!r}: position {bad} can see token {bad + 1}, which it would be "
            "scored on; next-token loss needs a mask inside causal(), or prefix(n)"
        )
    return first

"""The only door to torch.distributed. One process today: every function is exact for a world of 1.

Recipes and the step ask these functions and never the environment, so that several processes
change this file alone.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Summable = TypeVar("Summable", Tensor, int)


def rank() -> int:
    return 0


def world_size() -> int:
    return 1


def sum_over_ranks(x: Summable) -> Summable:
    """The sum of x over all ranks, on each of them."""
    return x

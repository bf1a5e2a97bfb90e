"""The mean of the vectors of a text's tokens: what is offered as an embedding of the text.

T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MeanVector:
    """The mean of the model's last hidden vectors (after the final norm) over the tokens of a text.

    They are added in float64 one after the other, so the mean has the same bits however the text
    was cut into passes. count: tokens so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, start: int, vectors: Tensor) -> None:
        """The vectors (T, C) of the tokens at start, start + 1 ...; none is counted twice."""
        assert start <= self.count
        new = vectors[self.count - start :].double()
        if self._sum is not None:
            new = torch.cat((self._sum[None], new))
        self._sum = new.cumsum(0)[-1]
        self.count = max(self.count, start + len(vectors))

    @property
    def value(self) -> Tensor:
        """(C,), float32; only once there are tokens."""
        assert self._sum is not None
        return (self._sum / self.count).float()

"""The forward passes of the engine, by torch's own ops.

B rows, T tokens, C channels, V vocabulary, N vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.generate.scheduler import Span
from gptsmith.model.kv_cache import PagedKVCache

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel


class TorchForward:
    """Vectors and logits of spans. Rounding depends on which spans are read together."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model

    def hidden(self, cache: PagedKVCache, spans: Sequence[Span]) -> list[Tensor]:
        """Read the spans, and store their keys and values. For each, the vectors (T, C) of all its
        tokens, or the one (1, C) of its last token."""
        found: dict[int, Tensor] = {}
        for group in _similar(spans):
            found |= zip(group, self._read(cache, [spans[i] for i in group]), strict=True)
        return [found[i] for i in range(len(spans))]

    def logits(self, x: Tensor, V: int) -> Tensor:
        """(N, V) of vectors x (N, C)."""
        return F.linear(x, self.model.head_weight)[:, :V]

    def refresh(self) -> None:
        """The weights have changed."""

    def _read(self, cache: PagedKVCache, spans: Sequence[Span]) -> Iterator[Tensor]:
        device = self.model.head_weight.device
        T = max(len(span.ids) for span in spans)
        ids = torch.tensor([[*s.ids, *[0] * (T - len(s.ids))] for s in spans], device=device)
        if spans[0].pages:
            cache.use(spans)
            x = self.model.hidden(ids, cache=cache)  # (B, T, C)
        else:  # padding is a document of its own, which the texts cannot see
            lengths = torch.tensor([[len(span.ids)] for span in spans], device=device)
            padding = (torch.arange(T, device=device) >= lengths).long()  # (B, T)
            x = self.model.hidden(ids, documents=padding if len(spans) > 1 else None)
        for vectors, span in zip(x, spans, strict=True):
            yield vectors[: len(span.ids)] if span.every else vectors[len(span.ids) - 1, None]


def _similar(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Which spans to read together: of similar length, as the shorter are padded. Single tokens
    are by themselves, since they need no padding and no copy of their queries; so are texts
    without a cache."""
    group: list[int] = []
    key: tuple[bool, bool] | None = None
    longest = 0
    order = sorted(
        range(len(spans)),
        key=lambda i: (not spans[i].pages, len(spans[i].ids) > 1, -len(spans[i].ids)),
    )
    for i in order:
        length = len(spans[i].ids)
        new = (not spans[i].pages, length > 1)
        if group and (new != key or longest > 16 + 2 * length):
            yield group
            group = []
        if not group:
            key, longest = new, length
        group.append(i)
    if group:
        yield group

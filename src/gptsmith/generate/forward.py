"""The forward passes of the engine: by our compiled kernels, or by PyTorch's own operations.

B rows, T tokens, C channels, V vocabulary, N vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.generate.decode_step import DecodeStep
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.sampling import reject_logits, sample, wide
from gptsmith.generate.scheduler import Span
from gptsmith.kernels.packed_model import PAGE, PackedModel, library_for
from gptsmith.kernels.pages import Pages
from gptsmith.model.decode_cache import FLASH_PAGE, flash_serves, flash_window
from gptsmith.model.kv_cache import PagedKVCache

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel

TORCH_PAGE = 16  # tokens of a page for PyTorch's operations


class Decoded(NamedTuple):
    """What a static step found for some of the spans.

    tokens: by the number of the span, in the order of the rows of `logits` (B, V): the token that
    was sampled after it, -1 if that is up to the host. The logits are overwritten by the next step.
    """

    tokens: dict[int, int]
    logits: Tensor


NOTHING_DECODED = Decoded({}, torch.empty(0, 0))


def decodes_by_graph(device: torch.device) -> bool:
    """Whether the newest tokens are read by a static step, which a CUDA graph replays: where
    launching operations takes longer than computing them."""
    return device.type == "cuda"


class KernelForward:
    """By the compiled kernels: a token's vector and logits have the same bits whatever else is in
    the batch, and however its sequence was divided into spans."""

    exact = True
    page = PAGE
    device = torch.device("cpu")

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self.clear()

    def clear(self) -> None:
        """Forget all keys and values, and free their memory."""
        self.cache = self._packed.pages(0)

    def refresh(self) -> None:
        """The weights have changed."""
        self._packed.refresh()
        self.clear()

    def hidden(self, spans: Sequence[Span]) -> list[Tensor]:
        """Read the spans, and store their keys and values. Returns for each the hidden vectors of
        all its tokens (T, C), or only that of its last one (1, C)."""
        found: dict[int, Tensor] = {}
        stored = [i for i, span in enumerate(spans) if span.pages]
        if stored:
            tables = [[*[-1] * spans[i].first, *spans[i].pages] for i in stored]
            vectors = self._read([spans[i] for i in stored], tables, self.cache)
            found |= zip(stored, vectors, strict=True)
        uncached = [i for i, span in enumerate(spans) if not span.pages]
        if uncached:  # pages for this pass only
            counts = [-(-len(spans[i].ids) // PAGE) for i in uncached]
            tables = [
                [*range(end - n, end)] for n, end in zip(counts, accumulate(counts), strict=True)
            ]
            pages = self._packed.pages(sum(counts))
            found |= zip(
                uncached, self._read([spans[i] for i in uncached], tables, pages), strict=True
            )
        return [found[i] for i in range(len(spans))]

    def decode(self, spans: Sequence[Span], V: int) -> Decoded:
        """Read those of the spans that a static step serves, and sample their next tokens."""
        return NOTHING_DECODED

    def logits(self, x: Tensor, V: int) -> Tensor:
        """(N, V) of vectors x (N, C)."""
        return self._packed.logits(x)[:, :V]

    def sample(
        self,
        logits: Sequence[Tensor],
        settings: Sequence[SamplingConfig],
        uniforms: Sequence[float],
    ) -> list[int]:
        """See sampling.sample, which does the same with rows as one tensor. By torch's operations
        each row takes twenty passes over its logits, in which torch wakes its threads."""
        rows = [
            (x.float(), point, s.temperature, s.top_p or 1.0, s.min_p or 0.0, s.top_k or 0)
            for x, s, point in zip(logits, settings, uniforms, strict=True)
        ]
        tokens = self._packed.sample(rows)
        if -1 in tokens:
            reject_logits(logits[tokens.index(-1)].max())
        return tokens

    def _read(
        self, spans: Sequence[Span], tables: Sequence[list[int]], pages: Pages
    ) -> Iterator[Tensor]:
        n = max(map(len, tables))
        x = self._packed.hidden(
            [token for span in spans for token in span.ids],
            [row for row, span in enumerate(spans) for _ in span.ids],
            [position for span in spans for position in range(span.start, span.stop)],
            torch.tensor([[*t, *[-1] * (n - len(t))] for t in tables], dtype=torch.int32),
            pages,
        )
        for span, vectors in zip(spans, x.split([len(span.ids) for span in spans]), strict=True):
            yield vectors if span.all_vectors else vectors[-1:]


class TorchForward:
    """By PyTorch's own operations: rounding depends on which spans are read together. Methods: see
    KernelForward."""

    exact = False

    def __init__(self, model: GPTModel, page: int) -> None:
        self._model, self.page = model, page
        self._step = DecodeStep(model) if decodes_by_graph(self.device) else None
        self.clear()

    @property
    def device(self) -> torch.device:
        return self._model.head_weight.device

    def clear(self) -> None:
        dtype = self._model.head_weight.dtype
        self.cache = PagedKVCache(self._model.config, self.page, dtype, self.device)
        if self._step is not None:
            self._step.clear()

    def refresh(self) -> None:
        self.clear()

    def hidden(self, spans: Sequence[Span]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group in _similar(spans):
            found |= zip(group, self._read([spans[i] for i in group]), strict=True)
        return [found[i] for i in range(len(spans))]

    def decode(self, spans: Sequence[Span], V: int) -> Decoded:
        if self._step is None:
            return NOTHING_DECODED
        served = [i for i, span in enumerate(spans) if self._step.serves(span)]
        if not served:
            return NOTHING_DECODED
        tokens, logits = self._step([spans[i] for i in served], self.cache, V)
        return Decoded(dict(zip(served, tokens, strict=True)), logits)

    def logits(self, x: Tensor, V: int) -> Tensor:
        return F.linear(x, self._model.head_weight)[:, :V]

    def sample(
        self,
        logits: Sequence[Tensor],
        settings: Sequence[SamplingConfig],
        uniforms: Sequence[float],
    ) -> list[int]:
        return sample(torch.stack([wide(x) for x in logits]), settings, uniforms)

    def _read(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        T = max(len(span.ids) for span in spans)
        ids = torch.tensor([[*s.ids, *[0] * (T - len(s.ids))] for s in spans], device=self.device)
        if spans[0].pages:
            self.cache.use(spans)
            x = self._model.hidden(ids, cache=self.cache)  # (B, T, C)
        else:  # padding is a document of its own, which other tokens do not attend to
            lengths = torch.tensor([[len(span.ids)] for span in spans], device=self.device)
            padding = (torch.arange(T, device=self.device) >= lengths).long()  # (B, T)
            x = self._model.hidden(ids, documents=padding if len(spans) > 1 else None)
        for vectors, span in zip(x, spans, strict=True):
            yield vectors[: len(span.ids)] if span.all_vectors else vectors[len(span.ids) - 1, None]


def _similar(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Groups of spans to read together: of similar length, because shorter ones are padded.
    Single tokens form groups of their own, since they need no padding and no copy of their queries;
    so do spans without a cache."""
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


def make_forward(
    model: GPTModel,
    weights: str = "auto",
    page: int | None = None,
    *,
    keep_model: bool = True,
) -> KernelForward | TorchForward:
    """The kernels if they support the model and the weights, else PyTorch's operations.

    weights, keep_model: see PackedModel. page: tokens of a page, for PyTorch's operations.
    ValueError for quantized weights where the kernels do not run.
    """
    dtype = model.head_weight.dtype
    exact = weights != "auto" or dtype in (torch.float32, torch.bfloat16)
    if page is None and exact and library_for(model, weights) is not None:
        return KernelForward(PackedModel(model, weights, keep_model=keep_model))
    flash = flash_window(model.mask) is not None and flash_serves(
        dtype, model.config.D, model.head_weight.device
    )
    return TorchForward(model, page or (FLASH_PAGE if flash else TORCH_PAGE))

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


class Vectors(NamedTuple):
    """Hidden vectors (N, C) of the tokens of some spans, perhaps with padding between spans.

    starts: by the number of a span, the row of its first token; those of its other tokens follow.
    """

    x: Tensor
    starts: dict[int, int]


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
        """The weights have changed. The cache's memory stays for what is read anew."""
        self._packed.refresh()
        if self.cache.dtype != self._packed.cache_dtype:
            self.clear()

    def hidden(self, spans: Sequence[Span], numbers: Sequence[int]) -> Vectors:
        """Read these of the spans, and store their keys and values."""
        stored = [i for i in numbers if spans[i].pages]
        rest = [i for i in numbers if not spans[i].pages]
        parts = []
        if stored:
            tables = [[*[-1] * spans[i].first, *spans[i].pages] for i in stored]
            parts.append(self._read(spans, stored, tables, self.cache))
        if rest:  # pages for this pass only
            counts = [-(-len(spans[i].ids) // PAGE) for i in rest]
            tables = [
                [*range(end - n, end)] for n, end in zip(counts, accumulate(counts), strict=True)
            ]
            parts.append(self._read(spans, rest, tables, self._packed.pages(sum(counts))))
        return _joined(parts)

    def decode(self, spans: Sequence[Span], V: int) -> Decoded:
        """Read those of the spans that a static step serves, and sample their next tokens."""
        return NOTHING_DECODED

    def logits(self, x: Tensor, V: int) -> Tensor:
        """(N, V) of vectors x (N, C)."""
        return self._packed.logits(x)[:, :V]

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        settings: Sequence[SamplingConfig],
        uniforms: Sequence[float],
    ) -> list[int]:
        """See sampling.sample, which does the same with these rows of the logits (N, V). By torch's
        operations each row takes twenty passes over its logits, in which torch wakes its
        threads."""
        tokens = self._packed.sample(
            logits.float(),
            rows,
            uniforms,
            [s.temperature for s in settings],
            [s.top_p or 1.0 for s in settings],
            [s.min_p or 0.0 for s in settings],
            [s.top_k or 0 for s in settings],
        )
        if -1 in tokens:
            reject_logits(logits[rows[tokens.index(-1)]].max())
        return tokens

    def _read(
        self,
        spans: Sequence[Span],
        numbers: Sequence[int],
        tables: Sequence[list[int]],
        pages: Pages,
    ) -> _Part:
        read, n = [spans[i] for i in numbers], max(map(len, tables))
        x = self._packed.hidden(
            [token for span in read for token in span.ids],
            [row for row, span in enumerate(read) for _ in span.ids],
            [position for span in read for position in range(span.start, span.stop)],
            [[*table, *[-1] * (n - len(table))] for table in tables],
            pages,
        )
        return _Part(numbers, [len(span.ids) for span in read], x)


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

    def hidden(self, spans: Sequence[Span], numbers: Sequence[int]) -> Vectors:
        return _joined([self._read(spans, group) for group in _similar(spans, numbers)])

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
        logits: Tensor,
        rows: Sequence[int],
        settings: Sequence[SamplingConfig],
        uniforms: Sequence[float],
    ) -> list[int]:
        return sample(wide(_rows(logits, rows)), settings, uniforms)

    def _read(self, spans: Sequence[Span], numbers: Sequence[int]) -> _Part:
        read = [spans[i] for i in numbers]
        T = max(len(span.ids) for span in read)
        ids = torch.tensor([[*s.ids, *[0] * (T - len(s.ids))] for s in read], device=self.device)
        if read[0].pages:
            self.cache.use(read)
            x = self._model.hidden(ids, cache=self.cache)  # (B, T, C)
        else:  # padding is a document of its own, which other tokens do not attend to
            lengths = torch.tensor([[len(span.ids)] for span in read], device=self.device)
            padding = (torch.arange(T, device=self.device) >= lengths).long()  # (B, T)
            x = self._model.hidden(ids, documents=padding if len(read) > 1 else None)
        return _Part(numbers, [T] * len(read), x.flatten(0, 1))


class _Part(NamedTuple):
    """Vectors of these of the spans, one span after the other; `lengths` may include padding."""

    numbers: Sequence[int]
    lengths: Sequence[int]
    x: Tensor


def _joined(parts: Sequence[_Part]) -> Vectors:
    starts: dict[int, int] = {}
    end = 0
    for part in parts:
        for i, length in zip(part.numbers, part.lengths, strict=True):
            starts[i], end = end, end + length
    found = [part.x for part in parts]
    return Vectors(found[0] if len(found) == 1 else torch.cat(found or [torch.empty(0)]), starts)


def _similar(spans: Sequence[Span], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Groups of these of the spans to read together: of similar length, because shorter ones are
    padded. Single tokens form groups of their own, since they need no padding and no copy of their
    queries; so do spans without a cache."""
    group: list[int] = []
    key: tuple[bool, bool] | None = None
    longest = 0
    order = sorted(
        numbers,
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


def next_logits(
    forward: KernelForward | TorchForward,
    spans: Sequence[Span],
    ready: Sequence[int],
    vectors: Vectors,
    decoded: Decoded,
    V: int,
) -> tuple[Tensor, dict[int, int]]:
    """Logits (N, V) from which the next tokens of the spans `ready` are to be sampled, and the row
    of each span: the logits after its newest token, which those after its draft tokens follow."""
    rows: dict[int, int] = {}
    wanted: list[int] = []
    for i in ready:
        if i in vectors.starts:
            rows[i], stop = len(wanted), vectors.starts[i] + len(spans[i].ids)
            wanted += range(stop - 1 - len(spans[i].draft), stop)
    on_host = {i: j for j, (i, token) in enumerate(decoded.tokens.items()) if token < 0}
    rows |= zip(on_host, range(len(wanted), len(wanted) + len(on_host)), strict=True)
    found = []
    if wanted:
        found.append(forward.logits(_rows(vectors.x, wanted), V))
    if on_host:
        found.append(_rows(decoded.logits, [*on_host.values()]))
    if len(found) == 1:
        return found[0], rows
    return torch.cat(found) if found else decoded.logits[:0], rows


def _rows(x: Tensor, numbers: Sequence[int]) -> Tensor:
    """These rows of x (N, ...), which is not copied if they are all of them."""
    if [*numbers] == [*range(len(x))]:
        return x
    return x.index_select(0, torch.tensor([*numbers], device=x.device))


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

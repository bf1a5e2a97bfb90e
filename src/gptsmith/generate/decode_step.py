"""Decoding on a GPU: one static computation for the newest tokens of all rows, as a CUDA graph.

A step uploads one table of numbers, replays the graph of its size, and reads the sampled ids: the
host launches three operations instead of hundreds. On other devices, where tests run it, and the
first time that a size occurs, the same computation is called as it is.

B rows, padded to a power of two, n pages of a row, likewise; C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith import terminal
from gptsmith.generate.request import RequestState
from gptsmith.generate.sampling import RowSettings, sample_rows, uniform
from gptsmith.generate.scheduler import Span
from gptsmith.model.decode_cache import DecodeCache, NewestTokens
from gptsmith.model.gpt import GPTModel
from gptsmith.model.kv_cache import PagedKVCache


class Sampling(IntEnum):
    """What the rows of a step need, the costliest last."""

    GREEDY = 0
    RANDOM = 1
    RANKED = 2  # top_k or top_p


class Size(NamedTuple):
    """For which a graph is captured."""

    rows: int
    pages: int  # of a row
    sampling: Sampling


# Columns of the table that is uploaded, before the pages of the row. All are int64; those of
# float64 share their bytes.
_IDS, _POSITIONS, _SLOTS, _STARTS, _TOP_K = range(5)
_FLOATS = slice(5, 9)  # temperature, uniform, top_p, log of min_p
_PAGES = 9


class DecodeStep:
    """Reads the newest token of any number of rows and samples the next.

    The contract is that of the CPU kernels' packed pass: ids, their positions, and for each row the
    pages that hold its keys and values, in which those of the new token are stored.
    """

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self._graphs = _Graphs()
        self.clear()

    def clear(self) -> None:
        """Forget the graphs: weights or pages are elsewhere now."""
        self._pages: Tensor | None = None
        self._steps: dict[Size, _StaticStep] = {}
        self._graphs.clear()

    @staticmethod
    def serves(span: Span) -> bool:
        """Whether it is the newest token of a cached row, and nothing else."""
        return bool(span.pages) and len(span.ids) == 1 and not span.state.scores_prompt

    def __call__(
        self, spans: Sequence[Span], pages: PagedKVCache, V: int
    ) -> tuple[list[int], Tensor]:
        """The token after each span, below V, or -1 where the host must choose it; and the logits
        (B, V) to choose it from, which the next call overwrites."""
        if self._pages is not pages.k:  # the pages have grown: graphs have the old addresses
            self.clear()
            self._pages = pages.k
        states = [span.state for span in spans]
        on_host = [s.changes_logits or s.request.logprobs is not None for s in states]
        needs = [
            Sampling.GREEDY if host else _sampling(s)
            for s, host in zip(states, on_host, strict=True)
        ]
        size = Size(
            _power_of_two(len(spans)), _power_of_two(max(len(s.pages) for s in spans)), max(needs)
        )
        if size not in self._steps:
            self._steps[size] = _StaticStep(self._model, pages, size, V, self._graphs)
        step = self._steps[size]
        step.fill(spans)
        step.run()
        tokens = step.tokens.tolist()  # waits for the device
        chosen = [-1 if host else token for token, host in zip(tokens, on_host, strict=False)]
        return chosen, step.logits


class _Graphs:
    """What the graphs of all sizes share: memory, since only one of them runs at a time, and the
    stream of their capture, since cuBLAS keeps a workspace for each stream."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._possible = True
        self.clear()

    def clear(self) -> None:
        """All graphs are gone, and their memory with them."""
        self._pool: Any = None

    def capture(self, device: torch.device, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of `run`, which is not computed; None if it cannot be captured, such as under a
        mask that is a user's function and moves a table to the device. A notice says so once."""
        if device.type != "cuda" or not self._possible:
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        try:
            # "thread_local": other threads, such as those of a server, may use the device meanwhile
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._possible = False
            reason = str(error).partition("\n")[0]
            terminal.note(f"Decoding without a CUDA graph, which is slower: {reason}")
            return None
        return graph


class _StaticStep:
    """The computation for one size: inputs and outputs that stay where they are."""

    tokens: Tensor  # (B,)
    logits: Tensor  # (B, V)

    def __init__(
        self, model: GPTModel, pages: PagedKVCache, size: Size, V: int, graphs: _Graphs
    ) -> None:
        self._model, self._V, self._sampling, self._graphs = model, V, size.sampling, graphs
        device, shape = pages.k.device, (size.rows, _PAGES + size.pages)
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs = table = torch.zeros(shape, dtype=torch.int64, device=device)
        newest = NewestTokens(
            table[:, _POSITIONS], table[:, _SLOTS], table[:, _STARTS], table[:, _PAGES:]
        )
        self._cache = DecodeCache(pages, newest, model.mask)
        floats = table[:, _FLOATS].view(torch.float64)
        temperature, point, top_p, log_min_p = floats.split(1, dim=1)
        self._settings = RowSettings(temperature, point, top_p, log_min_p, table[:, _TOP_K, None])
        # A row that only pads the batch: token 0 at position 0, in the page of no text.
        _, _, P, page, _ = pages.k.shape
        self._page, self._empty = page, np.zeros(shape[1], dtype=np.int64)
        self._empty[_SLOTS], self._empty[_PAGES:] = (P - 1) * page, P - 1
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def fill(self, spans: Sequence[Span]) -> None:
        """Describe the step on the host, and upload it."""
        table = self._host.numpy()
        table[:] = self._empty
        floats = table.view(np.float64)[:, _FLOATS]
        for i, span in enumerate(spans):
            s, position, start = span.state.request.sampling, span.start, span.first * self._page
            page, offset = divmod(position - start, self._page)
            slot = span.pages[page] * self._page + offset
            table[i, : _FLOATS.start] = span.ids[0], position, slot, start, s.top_k or 0
            table[i, _PAGES : _PAGES + len(span.pages)] = span.pages
            if s.temperature:
                floats[i] = (
                    s.temperature,
                    uniform(s.seed, span.state.position),
                    2.0 if s.top_p is None else s.top_p,
                    math.log(s.min_p) if s.min_p else -math.inf,
                )
        self._inputs.copy_(self._host, non_blocking=True)

    def run(self) -> None:
        """Compute `tokens` and `logits`. The first call loads what no graph may load; the second
        captures the graph."""
        self._calls += 1
        if self._calls == 2:
            self._graph = self._graphs.capture(self._inputs.device, self._compute)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def _compute(self) -> None:
        x = self._model.hidden(self._inputs[:, _IDS, None], cache=self._cache)[:, 0]  # (B, C)
        self.logits = F.linear(x, self._model.head_weight)[:, : self._V]
        settings = None if self._sampling == Sampling.GREEDY else self._settings
        self.tokens = sample_rows(self.logits, settings, self._sampling == Sampling.RANKED)


def _sampling(state: RequestState) -> Sampling:
    s = state.request.sampling
    if not s.temperature:
        return Sampling.GREEDY
    return Sampling.RANDOM if s.top_k is None and s.top_p is None else Sampling.RANKED


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()

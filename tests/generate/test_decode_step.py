"""The static step of decoding, which a GPU runs as a CUDA graph: here on the CPU, with recorded
operations instead of a graph. tests/test_gpu.py captures real ones."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import model_in_float64, randomize
from recorded_graph import RecordedGraph
from reference_texts import CONTEXT, LLAMA, MODELS, V, full_forward, prompt_lists, samplings
from torch import Tensor
from torch.nn.attention import varlen

from gptsmith.generate import decode_step, forward
from gptsmith.generate.decode_step import DecodeStep
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.generate.sampling import RowSettings, sample, sample_rows
from gptsmith.model import checks, decode_cache
from gptsmith.model.decode_cache import FLASH_PAGE, DecodeCache, NewestTokens, flash_window
from gptsmith.model.gpt import GPTModel
from gptsmith.model.kv_cache import PagedKVCache
from gptsmith.model.masks import parse


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Engines decode by the static step, with recorded operations as graphs: those made so far."""
    made: list[RecordedGraph] = []

    def capture(self: object, device: torch.device, run: Callable[[], None]) -> RecordedGraph:
        made.append(RecordedGraph(run))
        return made[-1]

    monkeypatch.setattr(forward, "decodes_by_graph", lambda device: True)
    monkeypatch.setattr(decode_step._Graphs, "capture", capture)
    monkeypatch.setattr(checks, "_outside", lambda *given: None)  # reads values, on a CPU only
    # in inference mode, operations are not divided into those that a device sees
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    return made


@pytest.mark.parametrize("kind", [*MODELS][:5])
def test_replayed_steps_equal_the_full_forward_of_each(
    kind: str, graphs: list[RecordedGraph]
) -> None:
    """Rows that join, leave, are preempted, share prefixes and are cancelled; new weights."""
    model = model_in_float64(MODELS[kind])

    @settings(max_examples=4)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        engine = Engine(
            model,
            max_batch_size=data.draw(st.integers(1, 5)),
            cache_tokens=data.draw(st.none() | st.integers(CONTEXT, 2 * CONTEXT)),
            page=data.draw(st.integers(1, 5)),
            draft_tokens=data.draw(st.sampled_from([0, 0, 2])),
        )
        start = data.draw(prompt_lists)
        pairs = []
        for _ in range(data.draw(st.integers(1, 5))):
            prompt = start[: data.draw(st.integers(0, len(start)))] + data.draw(prompt_lists)
            wanted = data.draw(st.none() | st.just(2))
            request = Request(prompt, data.draw(samplings), stop_ids=(), logprobs=wanted)
            pairs.append((request, engine.add(request)))
            for _ in range(data.draw(st.integers(0, 12))):
                engine.step()
            if data.draw(st.integers(0, 4)) == 0:
                engine.refresh()
        while engine.busy:
            engine.step()
        for request, generation in pairs:
            s = request.sampling
            assert generation.ids == full_forward(model, list(request.prompt), s, s.seed)
            assert len(generation.logprobs) == len(generation.ids) * (request.logprobs is not None)

    check()
    assert sum(graph.replays for graph in graphs) > 9


def test_one_graph_serves_all_steps_of_a_size(graphs: list[RecordedGraph]) -> None:
    engine = Engine(model_in_float64(LLAMA), cache_tokens=128, page=16)
    config = SamplingConfig(temperature=0, max_new_tokens=9)
    for i in range(3):  # until all pages are allocated
        engine.generate([[i, row] for row in range(4)], config)
    made, replays = len(graphs), graphs[-1].replays
    engine.generate([[i, 5] for i in range(3)], config)  # padded to 4
    assert (len(graphs), graphs[-1].replays) == (made, replays + 8)
    engine.generate([[7, 8]], config)  # the first step of a size is called as it is
    assert (len(graphs), graphs[-1].replays) == (made + 1, 7)


@torch.no_grad()
def test_refresh_makes_new_graphs_for_new_weights(graphs: list[RecordedGraph]) -> None:
    model = model_in_float64(LLAMA)
    engine, config = Engine(model), SamplingConfig(temperature=0, max_new_tokens=12)
    [before] = engine.generate([[1, 2, 3]], config)
    captured = len(graphs)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)  # elsewhere in memory, too
    engine.refresh()
    [after] = engine.generate([[1, 2, 3]], config)
    assert len(graphs) > captured
    assert after.ids == full_forward(model, [1, 2, 3], config, 0) != before.ids


def test_damaged_weights_are_reported(graphs: list[RecordedGraph]) -> None:
    model = model_in_float64(LLAMA)
    engine = Engine(model)
    generation = engine.add(Request([1, 2], SamplingConfig(temperature=0, max_new_tokens=9)))
    engine.step()
    with torch.no_grad():
        model.head_weight[3] = math.nan
    with pytest.raises(ValueError, match="its weights are damaged"):
        engine.step()
    assert generation.finish_reason == "cancelled"


def test_a_graph_that_cannot_be_captured_is_not_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forward, "decodes_by_graph", lambda device: True)
    model, tries = model_in_float64(LLAMA), []

    class Refuses:
        def __init__(self, *given: object, **named: object) -> None:
            tries.append(1)

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA says more")

        def __exit__(self, *given: object) -> None: ...

    real = decode_step._Graphs.capture
    on_cuda = torch.device("cuda")
    monkeypatch.setattr(
        decode_step._Graphs, "capture", lambda self, device, run: real(self, on_cuda, run)
    )
    for name in ("CUDAGraph", "graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: object())
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    sampling = SamplingConfig(max_new_tokens=12)
    engine = Engine(model)
    [a, b] = engine.generate([[1, 2, 3], [4]], sampling)
    engine.refresh()
    engine.generate([[1, 2, 3]], sampling)
    assert tries == [1]
    assert capsys.readouterr().err == (
        "Decoding without a CUDA graph, which is slower: operation not permitted when stream is"
        " capturing\n"
    )
    assert [a.ids, b.ids] == [
        full_forward(model, p, sampling, i) for i, p in enumerate([[1, 2, 3], [4]])
    ]


def test_graphs_of_all_sizes_are_captured_in_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps megabytes of workspace for each stream."""
    given = []

    def capturing(graph: object, pool: object, stream: object, **named: object) -> ExitStack:
        given.append((pool, stream))
        return ExitStack()

    for name in ("CUDAGraph", "graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: object())
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    graphs = decode_step._Graphs()
    for _ in range(2):
        graphs.capture(torch.device("cuda"), lambda: None)
        graphs.capture(torch.device("cuda"), lambda: None)
        graphs.clear()
    pools, streams = zip(*given, strict=True)
    assert len(set(streams)) == 1
    assert pools[0] == pools[1] != pools[2] == pools[3]


# --- attention through the page table ------------------------------------------------------------


def flash_in_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    num_splits: int,
) -> Tensor:  # fmt: skip
    """What the documentation of varlen_attn says, for one query of each sequence."""
    assert (max_q, num_splits) == (1, 1)
    assert k.shape[1] % 256 == 0
    assert {x.dtype for x in (cu_q, cu_k, seqused_k, block_table)} == {torch.int32}
    assert cu_q.tolist() == [*range(len(q) + 1)]
    assert all(x.stride(-1) == 1 for x in (q, k, v, block_table))
    assert enable_gqa == (q.shape[1] != k.shape[2])
    out = []
    for row, length, pages in zip(q, seqused_k.tolist(), block_table, strict=True):
        assert 1 <= length <= max_k
        keys, values = (x[pages.long()].flatten(0, 1)[:length] for x in (k, v))  # (S, K, D)
        groups = q.shape[1] // k.shape[2]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        left, right = window_size
        assert right in (-1, 0)
        first = 0 if left < 0 else max(0, length - 1 - left)
        scores = torch.einsum("hd,shd->hs", row, keys[first:]) * q.shape[2] ** -0.5
        out.append(torch.einsum("hs,shd->hd", scores.softmax(dim=-1), values[first:]))
    return torch.stack(out)


@pytest.mark.parametrize("mask", ["causal()", "causal() & sliding_window(300)"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_attention_is_asked_for_what_the_mask_says(
    mask: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "decodes_by_graph", lambda device: True)
    for module in (forward, decode_cache):
        monkeypatch.setattr(module, "flash_serves", lambda *given: True)
    monkeypatch.setattr(varlen, "varlen_attn", flash_in_torch)
    config = LLAMA.change(context_length=800, n_head=4, n_kv_head=kv_heads, mask=mask)
    model = model_in_float64(config)
    engine = Engine(model)
    assert engine._pages.size == FLASH_PAGE
    prompts = [[i % V for i in range(n)] for n in (510, 3, 300, 765)]
    sampling = SamplingConfig(temperature=0, max_new_tokens=6)
    for prompt, found in zip(prompts, engine.generate(prompts, sampling), strict=True):
        assert found.ids == full_forward(model, prompt, sampling, 0)


def test_flash_attention_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(*given: Any, **named: Any) -> Tensor:
        out = flash_in_torch(*given, **named)
        out[1:] = math.nan  # as in pytorch#194167
        return out

    def is_right() -> bool:
        decode_cache._flash_is_right.cache_clear()
        return decode_cache._flash_is_right(torch.bfloat16, 16, torch.device("cpu"))

    assert not is_right()  # no such kernel for a CPU
    monkeypatch.setattr(varlen, "varlen_attn", flash_in_torch)
    assert is_right()
    monkeypatch.setattr(varlen, "varlen_attn", unwritten)
    assert not is_right()
    decode_cache._flash_is_right.cache_clear()


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        ("causal()", (-1, -1)),
        ("causal() & causal()", (-1, -1)),
        ("causal() & sliding_window(7)", (6, 0)),
        ("sliding_window(7) & causal()", (6, 0)),
        ("causal() & sliding_window(7) & sliding_window(9)", None),
        ("causal() & (sliding_window(7) | prefix(2))", None),
        ("causal() & ~prefix(8)", None),
        ("prefix(8)", None),
    ],
)
def test_masks_that_flash_attention_knows(mask: str, window: tuple[int, int] | None) -> None:
    assert flash_window(parse(mask)) == window


@pytest.mark.parametrize("mask", ["causal()", "causal() & ~prefix(2)"])
def test_the_pass_waits_for_no_number(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has shapes and no numbers; varlen_attn says what it makes of these shapes."""
    monkeypatch.setattr(decode_cache, "flash_serves", lambda *given: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # not known for meta
    config = LLAMA.change(context_length=1024, mask=mask, n_embd=32)
    device = torch.device("meta")
    model = GPTModel(config).to(device, torch.bfloat16)
    pages = PagedKVCache(config, FLASH_PAGE, torch.bfloat16, device)
    pages.grow(7)
    table = torch.zeros(4, 8, dtype=torch.int64, device=device)
    newest = NewestTokens(table[:, 1], table[:, 2], table[:, 3], table[:, 4:])
    cache = DecodeCache(pages, newest, model.mask)
    assert (cache._window is not None) == (mask == "causal()")
    with torch.no_grad():
        x = model.hidden(table[:, 0, None], cache=cache)
    assert (x.shape, x.dtype, x.device) == ((4, 1, 32), torch.bfloat16, device)
    numbers = torch.zeros(4, 4, dtype=torch.float64, device=device)
    settings = RowSettings(*numbers.split(1, dim=1), table[:, :1])
    tokens = sample_rows(x[:, 0] @ model.head_weight.T, settings, ranked=True)
    assert (tokens.shape, tokens.device) == ((4,), device)


# --- sampling ------------------------------------------------------------------------------------


def rows_of(settings: list[SamplingConfig], points: list[float]) -> RowSettings:
    def column(values: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype)[:, None]

    return RowSettings(
        column([s.temperature for s in settings]),
        column(points),
        column([2.0 if s.top_p is None else s.top_p for s in settings]),
        column([math.log(s.min_p) if s.min_p else -math.inf for s in settings]),
        column([s.top_k or 0 for s in settings], torch.int64),
    )


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(samplings, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_rows_are_sampled_as_each_alone(
    rows: list[tuple[SamplingConfig, float]], seed: int, ties: bool
) -> None:
    configs, points = [s for s, _ in rows], [point for _, point in rows]
    x = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed)) * 3
    x = x.round() if ties else x
    found = sample_rows(x, rows_of(configs, points), ranked=True)
    assert found.tolist() == sample(x.double(), configs, points)
    if all(s.top_k is None and s.top_p is None for s in configs):
        assert sample_rows(x, rows_of(configs, points), ranked=False).equal(found)


def test_what_the_host_must_sample() -> None:
    flat = torch.linspace(0, 1e-3, 3000).expand(7, -1).clone()
    flat[5, 7], flat[6, 7] = math.nan, math.inf
    S = SamplingConfig
    configs = [S(top_p=0.3), S(top_p=0.4), S(top_k=1024, top_p=0.9), S(top_k=1025), S(), S(), S()]
    points = [0.5] * 7
    found = sample_rows(flat, rows_of(configs, points), ranked=True).tolist()
    alone = sample(flat[:5].double(), configs[:5], points[:5])
    assert found == [alone[0], -1, alone[2], -1, alone[4], -1, -1]


def test_a_nucleus_beyond_the_candidates_is_found(graphs: list[RecordedGraph]) -> None:
    """The device leaves it to the host."""
    config = LLAMA.change(vocab_size=3000)
    model = GPTModel(config).double()
    randomize(model, size=0.02)
    sampling = SamplingConfig(temperature=2.0, top_p=0.95, max_new_tokens=8)
    [found] = Engine(model).generate([[5, 6]], sampling)
    assert found.ids == full_forward(model, [5, 6], sampling, 0)
    assert graphs


def test_only_the_newest_token_of_a_cached_row_is_served() -> None:
    for pages, ids, scores_prompt, served in [
        ([3], [1], False, True),
        ([3], [1, 2], False, False),
        ([3], [1], True, False),
        ([], [1], False, False),
    ]:
        state = SimpleNamespace(scores_prompt=scores_prompt)
        span = SimpleNamespace(state=state, pages=pages, ids=ids)
        assert DecodeStep.serves(span) == served  # type: ignore[arg-type]

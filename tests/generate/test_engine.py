"""The engine: batched = alone, cached = full forward; requests come and go; prefixes are reused."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import model_in_float64
from reference_texts import CONTEXT, GPT2, LLAMA, MODELS, V, full_forward, prompt_lists, samplings

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Generation, Request
from gptsmith.model.gpt import GPTModel
from gptsmith.model.kv_cache import PagedKVCache
from gptsmith.model.masks import Mask
from gptsmith.tokenizer import Tokenizer


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.ids for generation in generations]


@contextmanager
def shapes_read(model: GPTModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes (B, T) of all ids that the model reads."""
    shapes: list[tuple[int, ...]] = []
    hook = model.embedding.token.register_forward_hook(lambda m, a, o: shapes.append(a[0].shape))
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("model", [model_in_float64(c) for c in MODELS.values()], ids=MODELS)
@settings(max_examples=12)
@given(
    prompts=st.lists(prompt_lists, min_size=1, max_size=4),
    config=samplings,
    stop=st.integers(0, V - 1),
)
def test_batched_rows_equal_the_full_forward_of_each(
    model: GPTModel, prompts: list[list[int]], config: SamplingConfig, stop: int
) -> None:
    generations = Engine(model).generate(prompts, config)
    expected = [full_forward(model, p, config, config.seed + i) for i, p in enumerate(prompts)]
    assert ids_of(generations) == expected
    assert all(generation.finish_reason == "length" for generation in generations)

    stopped = Engine(model).generate(prompts, config, stop_ids=[stop])
    for generation, full in zip(stopped, expected, strict=True):
        assert generation.ids == (full[: full.index(stop)] if stop in full else full)
        assert generation.finish_reason == ("stop" if stop in full else "length")


@pytest.mark.parametrize("model", [model_in_float64(c) for c in MODELS.values()], ids=MODELS)
@settings(max_examples=12)
@given(data=st.data())
def test_requests_join_and_leave_between_steps(model: GPTModel, data: st.DataObject) -> None:
    """Requests with settings of their own, prompts with shared beginnings, a small batch: every
    text is that of its request alone. Some are cancelled, and the weights are refreshed."""
    engine = Engine(
        model,
        max_batch_size=data.draw(st.integers(1, 3)),
        cache_tokens=data.draw(st.none() | st.integers(CONTEXT, 2 * CONTEXT)),
        page=data.draw(st.integers(1, 5)),
        chunk=data.draw(st.integers(1, 8)),
        budget=data.draw(st.integers(1, 12)),
        draft_tokens=data.draw(st.integers(0, 4)),
    )
    start = data.draw(prompt_lists)
    requests: list[tuple[Request, Generation]] = []
    cancelled = []
    for _ in range(data.draw(st.integers(1, 6))):
        prompt = start[: data.draw(st.integers(0, len(start)))] + data.draw(prompt_lists)
        request = Request(prompt, data.draw(samplings), stop_ids=())
        requests.append((request, engine.add(request)))
        for _ in range(data.draw(st.integers(0, 20))):
            engine.step()
        match data.draw(st.integers(0, 5)):
            case 0:
                engine.refresh()
            case 1:
                cancelled.append(data.draw(st.sampled_from(requests))[1])
                engine.cancel(cancelled[-1])
    while engine.busy:
        for generation in engine.step():
            assert generation.finish_reason == "length"
    assert engine.step() == []
    for request, generation in requests:
        expected = full_forward(
            model, list(request.prompt), request.sampling, request.sampling.seed
        )
        if generation.finish_reason == "cancelled":
            assert any(generation is one for one in cancelled)
            assert expected[: len(generation.ids)] == generation.ids
        else:
            assert generation.ids == expected


@torch.no_grad()
def test_float32_rows_agree_within_rounding() -> None:
    model = model_in_float64(LLAMA).float()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    config = SamplingConfig(max_new_tokens=40)
    for i, generation in enumerate(Engine(model).generate(prompts, config)):
        assert generation.ids == full_forward(model, prompts[i], config, i)
        alone = Engine(model).generate(prompts[i : i + 1], config.with_seed(i))
        assert generation.ids == alone[0].ids


def test_a_bfloat16_model_generates() -> None:
    model = model_in_float64(LLAMA).bfloat16()
    generations = Engine(model).generate([[1, 2, 3], [4]], SamplingConfig(max_new_tokens=30))
    assert [len(g.ids) for g in generations] == [30, 30]


def test_a_step_reads_one_position_per_row_and_finished_rows_leave() -> None:
    model = model_in_float64(GPT2)
    config = SamplingConfig(max_new_tokens=10, temperature=1.5)
    with shapes_read(model) as shapes:
        [long, short] = Engine(model).generate([[1, 2, 3], [4]], config)
    assert shapes == [(1, 1), (1, 3)] + [(2, 1)] * 9
    stop = next(t for t in long.ids if t not in short.ids)
    at = long.ids.index(stop)
    with shapes_read(model) as shapes:
        Engine(model).generate([[1, 2, 3], [4]], config, stop_ids=[stop])
    assert shapes == [(1, 1), (1, 3)] + [(2, 1)] * at + [(1, 1)] * (9 - at)


def test_waiting_requests_join_when_others_finish() -> None:
    model = model_in_float64(GPT2)
    engine = Engine(model, max_batch_size=2)
    lengths = (3, 5, 4)
    generations = [
        engine.add(Request([i], SamplingConfig(max_new_tokens=n))) for i, n in enumerate(lengths)
    ]
    with shapes_read(model) as shapes:
        finished = list(engine.as_completed(generations))
    assert shapes == [(2, 1)] * 5 + [(1, 1)] * 2
    assert finished == generations
    assert list(engine.as_completed(generations)) == generations


def test_past_the_context_only_that_row_is_read_again() -> None:
    model = model_in_float64(GPT2)
    prompts = [[*range(15)], [2] * 3]
    with shapes_read(model) as shapes:
        generations = Engine(model).generate(prompts, SamplingConfig(max_new_tokens=6))
    assert shapes == [(2, 15), (2, 1), (1, 1), (1, 8), (2, 1), (2, 1), (2, 1)]
    assert [g.dropped_tokens for g in generations] == [9, 0]
    assert [g.notice for g in generations] == [None, None]
    [cut] = Engine(model).generate([[3] * 40], SamplingConfig(max_new_tokens=1))
    assert cut.dropped_tokens == 32


def test_without_context_shift_a_text_ends_with_the_context() -> None:
    engine = Engine(model_in_float64(GPT2))
    prompts = [[1] * 10, [2] * 15, [3] * 16]
    config = SamplingConfig(max_new_tokens=40)
    shifted = engine.generate(prompts, config)
    ended = engine.generate(prompts, config, context_shift=False)
    for prompt, short, long in zip(prompts, ended, shifted, strict=True):
        assert short.ids == long.ids[: CONTEXT - len(prompt)]
        assert (short.finish_reason, short.dropped_tokens) == ("length", 0)
    with pytest.raises(ValueError, match="17 tokens do not fit into the model's context of 16"):
        engine.generate([[1] * 17], config, context_shift=False)


def test_a_mask_that_looks_ahead_is_noted() -> None:
    config = SamplingConfig(max_new_tokens=6)
    engine = Engine(model_in_float64(MODELS["prefix"]))
    short, long = engine.generate([[1], [1, 2, 3, 4, 5]], config)
    assert short.notice is not None
    assert "prefix(4)" in short.notice
    assert long.notice is None
    by_row = model_in_float64(GPT2)
    by_row.mask = Mask(lambda b, h, q, k: (q >= k) & (b >= 0), "rows")
    with pytest.raises(ValueError, match="mask rows depends on the row"):
        Engine(by_row)


# --- the cache between requests ------------------------------------------------------------------


def test_a_prompt_that_continues_a_finished_text_reads_only_what_is_new() -> None:
    model = model_in_float64(GPT2.change(context_length=32))
    engine = Engine(model)
    config = SamplingConfig(max_new_tokens=4)
    [first] = engine.generate([[1, 2, 3]], config)
    turn = [1, 2, 3, *first.ids, 5, 6]
    with shapes_read(model) as shapes:
        [second] = engine.generate([turn], config)
    assert shapes == [(1, 3), (1, 1), (1, 1), (1, 1)]  # the last token of a text is never read
    assert second.ids == Engine(model).generate([turn], config)[0].ids
    other = [*turn[:5], (turn[5] + 1) % V, 9]  # a turn that goes on differently
    with shapes_read(model) as shapes:
        [third] = engine.generate([other], config)
    assert shapes[0] == (1, 2)
    assert third.ids == Engine(model).generate([other], config)[0].ids


def test_running_requests_share_their_prefix() -> None:
    model = model_in_float64(GPT2)
    engine = Engine(model)
    config = SamplingConfig(max_new_tokens=5)
    generations = [engine.add(Request([1, 2, 3, 4, 5, 6], config))]
    engine.step()
    generations += [engine.add(Request([1, 2, 3, 4, 7, i], config)) for i in range(2)]
    with shapes_read(model) as shapes:
        engine.step()
    assert shapes == [(1, 1), (2, 2)]
    list(engine.as_completed(generations))
    assert generations[2].ids == full_forward(model, [1, 2, 3, 4, 7, 1], config, 0)


def test_a_window_needs_no_pages_before_it() -> None:
    model = model_in_float64(MODELS["rope, 1 kv head, window"].change(context_length=64))
    engine = Engine(model, page=4)
    config = SamplingConfig(max_new_tokens=40)
    running = engine.add(Request([1, 2, 3], config))
    for _ in range(39):
        engine.step()
        assert engine.stats.pages_used <= 3  # a window of 5 tokens
    [*engine.as_completed([running])]
    text = [1, 2, 3, *running.ids]
    for prompt in (text[:30], [*text[:7], 9], [*text, 4]):
        [generation] = engine.generate([prompt], config)
        assert generation.ids == full_forward(model, prompt, config, 0)
    assert generation.cached_tokens == len(text)


def test_out_of_memory_while_requests_join_cancels_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_in_float64(LLAMA))
    generation = engine.add(Request([1, 2, 3]))

    def grow(*sizes: object) -> None:
        raise torch.OutOfMemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(PagedKVCache, "grow", grow)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert generation.finish_reason == "cancelled"
    assert not engine.busy
    [after] = engine.generate([[1, 2, 3]], SamplingConfig(max_new_tokens=2))
    assert len(after.ids) == 2


def test_a_cancelled_request_is_completed_while_others_go_on() -> None:
    engine = Engine(model_in_float64(LLAMA))
    long = engine.add(Request([1, 2], SamplingConfig(max_new_tokens=12)))
    short = engine.add(Request([3, 4], SamplingConfig(max_new_tokens=12)))
    engine.step()
    engine.cancel(short)
    assert next(engine.as_completed([short])) is short
    assert len(long.ids) == 1
    assert next(engine.as_completed([long])) is long


@torch.no_grad()
def test_refresh_forgets_the_keys_of_old_weights() -> None:
    model = model_in_float64(LLAMA)
    engine = Engine(model)
    config = SamplingConfig(max_new_tokens=6)
    engine.generate([[1, 2, 3, 4]], config)
    running = engine.add(Request([1, 2, 3], config))
    engine.step()
    before = list(running.ids)
    for p in model.parameters():  # a step of training
        p.add_(torch.randn_like(p) * 0.1)
    engine.refresh()
    [generation] = engine.generate([[1, 2, 3, 4]], config)
    assert generation.ids == full_forward(model, [1, 2, 3, 4], config, 0)
    assert running.ids[: len(before)] == before
    assert len(running.ids) == 6


def test_an_interrupted_step_cancels_everything_and_leaves_a_working_engine() -> None:
    model = model_in_float64(GPT2)
    engine = Engine(model)
    config = SamplingConfig(max_new_tokens=6)
    expected = ids_of(Engine(model).generate([[1, 2], [3]], config))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    generations = [engine.add(Request([1, 2], config)), engine.add(Request([1, 2, 3], config))]
    engine.step()
    hook = model.blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    assert [g.finish_reason for g in generations] == ["cancelled"] * 2
    assert not engine.busy
    assert ids_of(engine.generate([[1, 2], [3]], config)) == expected


def test_training_mode_and_global_random_state_are_kept() -> None:
    model = model_in_float64(GPT2.change(dropout=0.5)).train()
    state = torch.get_rng_state()
    config = SamplingConfig(max_new_tokens=20)
    first = ids_of(Engine(model).generate([[1, 2]], config))
    assert model.training
    assert model.blocks[0].training
    with torch.autocast("cpu", torch.bfloat16):
        assert ids_of(Engine(model).generate([[1, 2]], config)) == first
    assert torch.get_rng_state().equal(state)
    assert Engine(model).generate([], config) == []


def test_invalid_requests_are_rejected() -> None:
    config = SamplingConfig(max_new_tokens=2)
    engine = Engine(model_in_float64(GPT2))
    with pytest.raises(ValueError, match=r"prompt 1: an empty prompt: .* <\|endoftext\|>"):
        engine.generate([[1], []], config)
    assert not engine.busy
    for bad in (-1, V):
        with pytest.raises(ValueError, match=rf"prompt 0: id {bad} is outside .* 0\.\.22"):
            engine.generate([[1, bad]], config)
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine.generate([[1]], config, stop=["x"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.generate("x", config)
    with pytest.raises(ValueError, match="empty string"):
        Engine(model_in_float64(GPT2), Tokenizer.byte()).generate([[1]], config, stop=["x", ""])

"""Log-probabilities of texts and prompts, bias, and requests that generate nothing."""

import pytest
import torch
from random_weights import model_in_float64

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import QueueFull, Request
from gptsmith.generate.sampling import TokenLogprob
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

V, CONTEXT = 23, 32
CONFIG = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=16, context_length=CONTEXT, vocab_size=V
)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return model_in_float64(CONFIG)


@torch.no_grad()
def expected(model: GPTModel, text: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) of what follows each token of a text."""
    return model(torch.tensor([text]))[0].log_softmax(-1)


def agree(found: list[TokenLogprob | None], logprobs: torch.Tensor, ids: list[int]) -> bool:
    """Whether what was found is what `logprobs` (T, V) says about ids (T,)."""
    for one, row, token in zip(found, logprobs, ids, strict=True):
        assert one is not None
        assert one.id == token
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-5)
        best = row.topk(len(one.top))
        assert [i for i, _ in one.top] == best.indices.tolist()
        assert [p for _, p in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    return True


def finish(engine: Engine, *requests: Request) -> list:
    generations = [engine.add(request) for request in requests]
    return [*engine.as_completed(generations)] and generations


@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("warm", [False, True])
def test_logprobs_of_prompt_and_text_are_those_of_the_full_forward(
    model: GPTModel, warm: bool, chunk: int
) -> None:
    engine = Engine(model, page=4, chunk=chunk)
    if warm:
        finish(engine, Request([*PROMPT, 1, 2], SamplingConfig(max_new_tokens=9)))
    sampling = SamplingConfig(
        max_new_tokens=8, temperature=1.5, top_k=9, presence_penalty=1, repetition_penalty=1.2
    )
    scored = Request(PROMPT, sampling, logprobs=3, prompt_logprobs=2, logit_bias={4: 2.0})
    plain = Request(PROMPT, sampling, logprobs=0, logit_bias={4: 2.0})
    one, other, bare = finish(engine, scored, plain, Request(PROMPT, sampling))
    logprobs = expected(model, [*PROMPT, *one.ids])
    assert one.prompt_logprobs[0] is None
    assert agree(one.prompt_logprobs[1:], logprobs[: len(PROMPT) - 1], PROMPT[1:])
    assert agree(one.logprobs, logprobs[len(PROMPT) - 1 : -1], one.ids)
    assert other.ids == one.ids
    assert [p.logprob for p in other.logprobs] == pytest.approx([p.logprob for p in one.logprobs])
    assert {p.top for p in other.logprobs} == {()}
    assert not other.prompt_logprobs
    assert not bare.logprobs
    assert one.cached_tokens == 0  # all of the prompt had to be read
    if warm:
        assert other.cached_tokens == len(PROMPT) - 1


def test_a_prompt_can_be_scored_without_new_tokens(model: GPTModel) -> None:
    nothing = SamplingConfig(max_new_tokens=0)
    full = [*PROMPT, *PROMPT, 1, 2]
    engine = Engine(model, page=4)
    one, longest, unread = finish(
        engine,
        Request(PROMPT, nothing, prompt_logprobs=0),
        Request(full, nothing, prompt_logprobs=V),
        Request(PROMPT, nothing),
    )
    for generation, prompt in ((one, PROMPT), (longest, full)):
        assert generation.ids == []
        assert generation.finish_reason == "length"
        found = generation.prompt_logprobs
        assert agree(found[1:], expected(model, prompt)[:-1], prompt[1:])
    assert unread.finish_reason == "length"
    assert not unread.prompt_logprobs
    total = sum(p.logprob for p in one.prompt_logprobs[1:])
    picked = expected(model, PROMPT)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])
    assert total == pytest.approx(float(picked.sum()), abs=1e-4)
    with pytest.raises(ValueError, match="33 tokens do not fit into the model's context of 32"):
        engine.add(Request([*full, 3], nothing, prompt_logprobs=0))


def test_logprobs_survive_preemption(model: GPTModel) -> None:
    sampling = SamplingConfig(max_new_tokens=17)
    requests = [
        Request([seed, *PROMPT[1:]], sampling.with_seed(seed), logprobs=2, prompt_logprobs=1)
        for seed in range(6)
    ]
    engine = Engine(model, page=2, chunk=4, budget=4, cache_tokens=CONTEXT)
    for request, generation in zip(requests, finish(engine, *requests), strict=True):
        [alone] = finish(Engine(model), request)
        assert generation.ids == alone.ids
        text = [*request.prompt, *generation.ids]
        found = [*generation.prompt_logprobs[1:], *generation.logprobs]
        assert agree(found, expected(model, text)[:-1], text[1:])


def test_a_bias_forbids_or_forces_a_token(model: GPTModel) -> None:
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0)
    greedy = sampling.model_copy(update={"temperature": 0})
    forced, free, forbidden = finish(
        Engine(model),
        Request([1], sampling, logit_bias={7: 100.0}),
        Request([1], sampling),
        Request([1], greedy, logit_bias=dict.fromkeys(range(11), -100.0)),
    )
    assert forced.ids == [7] * 12
    assert free.ids != forced.ids
    assert min(forbidden.ids) >= 11
    for bias in ({V: 1.0}, {-1: 1.0}, {2: float("inf")}):
        with pytest.raises(ValueError, match=r"logit_bias .* ids from 0 to 22 and numbers"):
            Engine(model).add(Request([1], sampling, logit_bias=bias))


def test_a_continuation_with_the_same_seed_is_the_rest_of_the_text(model: GPTModel) -> None:
    """Random numbers belong to positions."""
    engine = Engine(model)
    [whole] = finish(engine, Request(PROMPT, SamplingConfig(max_new_tokens=15, seed=5)))
    [rest] = finish(
        engine, Request([*PROMPT, *whole.ids[:6]], SamplingConfig(max_new_tokens=9, seed=5))
    )
    assert rest.ids == whole.ids[6:]


def test_samples_of_one_prompt_read_it_once_and_differ(model: GPTModel) -> None:
    engine = Engine(model, page=4)
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.5)
    requests = [Request(PROMPT, sampling.with_seed(i)) for i in range(8)]
    generations = finish(engine, *requests)
    assert len({tuple(generation.ids) for generation in generations}) > 4
    assert sum(g.cached_tokens for g in generations) >= 7 * 12
    for request, generation in zip(requests, generations, strict=True):
        assert finish(Engine(model), request)[0].ids == generation.ids


def test_namespaces_and_refresh_share_nothing(model: GPTModel) -> None:
    engine = Engine(model)
    short = SamplingConfig(max_new_tokens=1)
    cached = [
        finish(engine, Request(PROMPT, short, namespace=namespace))[0].cached_tokens
        for namespace in ("a", "b", "a")
    ]
    engine.refresh()
    cached += [finish(engine, Request(PROMPT, short, namespace="a"))[0].cached_tokens]
    assert cached == [0, 0, len(PROMPT) - 1, 0]


def test_a_full_queue_and_stats(model: GPTModel) -> None:
    engine = Engine(model, max_batch_size=2, max_waiting=1, cache_tokens=2 * CONTEXT)
    sampling = SamplingConfig(max_new_tokens=3)
    generations = [engine.add(Request([i + 1, 2], sampling)) for i in range(3)]
    assert engine.remaining_capacity == 0
    with pytest.raises(QueueFull):
        engine.add(Request([1], sampling))
    engine.step()
    stats = engine.stats
    assert (stats.waiting, stats.running, stats.tokens_computed, stats.cached_tokens) == (
        1,
        2,
        4,
        0,
    )
    assert (stats.pages_used, stats.pages_limit) == (2, 4)
    engine.cancel(generations[0])
    assert engine.remaining_capacity == 1
    [*engine.as_completed(generations)]
    assert [g.finish_reason for g in generations] == ["cancelled", "length", "length"]
    with pytest.raises(ValueError, match="cache_tokens of 31 is less than the model's context"):
        Engine(model, cache_tokens=31)

"""Where our kernels run, a request gets the same ids and the same bits of log-probabilities in any
batch, with a cold or warm cache, in any chunks, preempted or not."""

import copy
import os
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Generation, Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

V, CONTEXT = 97, 256
REQUESTS = 10_000 if os.environ.get("GPTSMITH_SOAK") else 80  # compared in random batches
TOGETHER = 40  # requests that come together
LLAMA = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=56, context_length=CONTEXT, vocab_size=V
)
GPT2 = LLAMA.change(norm="layernorm", mlp="gelu", position="learned", bias="all", n_kv_head=4)
CASES = {
    "llama fp32": (LLAMA, torch.float32),
    "llama bf16": (LLAMA, torch.bfloat16),
    "gpt2 fp32": (GPT2, torch.float32),
    "gpt2 bf16": (GPT2, torch.bfloat16),
    "window bf16": (LLAMA.change(mask="causal() & sliding_window(70)"), torch.bfloat16),
    "prefix fp32": (LLAMA.change(mask="prefix(5)"), torch.float32),
}


def make(name: str) -> GPTModel:
    config, dtype = CASES[name]
    torch.manual_seed(0)
    model = GPTModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> GPTModel:
    model = make(request.param)
    if not Engine(model).exact:
        pytest.skip("no compiled kernels on this machine")
    return model


def requests(n: int, scored: bool = True, draw: int = 0) -> list[Request]:
    """Prompts of 1 to 200 tokens, some with common beginnings; greedy and sampled. draw: another
    number gives others."""
    choose = random.Random(draw)
    system = [choose.randrange(V) for _ in range(100)]
    made = []
    for i in range(n):
        prompt = [choose.randrange(V) for _ in range(choose.choice([1, 5, 40, 64, 65, 100]))]
        if i % 3 == 0:
            prompt = system[: choose.choice([20, 64, 100])] + prompt
        sampling = SamplingConfig(
            max_new_tokens=choose.randrange(1, 24),
            temperature=choose.choice([0, 0.8, 1.5]),
            top_k=choose.choice([None, 20]),
            top_p=choose.choice([None, 0.9]),
            frequency_penalty=choose.choice([0, 0.5]),
            seed=i,
        )
        scores = 1 if scored and i % 5 == 0 else None
        made.append(Request(prompt, sampling, logprobs=3, prompt_logprobs=scores))
    return made


def run(engine: Engine, given: list[Request]) -> list[Generation]:
    generations = [engine.add(request) for request in given]
    return [*engine.as_completed(generations)] and generations


def same(found: list[Generation], expected: list[Generation]) -> bool:
    for a, b in zip(found, expected, strict=True):
        assert a.ids == b.ids
        assert a.logprobs == b.logprobs  # the same bits
        assert a.prompt_logprobs == b.prompt_logprobs
    return True


@pytest.fixture(scope="module")
def alone(model: GPTModel) -> list[Generation]:
    """Each request by itself on a fresh engine."""
    engine = Engine(model)
    generations = []
    for request in requests(40):
        generations += run(engine, [request])
        engine.refresh()
    return generations


def test_other_requests_change_no_bit(model: GPTModel, alone: list[Generation]) -> None:
    assert same(run(Engine(model), requests(40)), alone)


def test_a_prefix_hit_changes_no_bit(model: GPTModel, alone: list[Generation]) -> None:
    engine = Engine(model, cache_tokens=40 * CONTEXT)
    run(engine, requests(40))
    warm = run(engine, requests(40))
    assert sum(generation.cached_tokens for generation in warm) > 1000
    assert same(warm, alone)


def test_weights_of_another_precision_count_after_refresh(model: GPTModel) -> None:
    """The cache takes their precision."""
    changed = copy.deepcopy(model)
    engine = Engine(changed)
    run(engine, requests(4))
    changed.to(torch.bfloat16)
    engine.refresh()
    assert same(run(engine, requests(4)), run(Engine(changed), requests(4)))


@pytest.mark.parametrize(("chunk", "budget"), [(7, 7), (64, 100), (33, 500)])
def test_cuts_of_prompts_change_no_bit(
    model: GPTModel, alone: list[Generation], chunk: int, budget: int
) -> None:
    engine = Engine(model, chunk=chunk, budget=budget, max_batch_size=9)
    assert same(run(engine, requests(40)), alone)


def test_preemption_and_cancelled_neighbours_change_no_bit(
    model: GPTModel, alone: list[Generation]
) -> None:
    engine = Engine(model, cache_tokens=CONTEXT + 64, max_batch_size=8)
    others = [engine.add(request) for request in requests(12, scored=False)]
    generations = [engine.add(request) for request in requests(40)]
    for generation in others:
        engine.step()
        engine.cancel(generation)
    assert [*engine.as_completed(generations)]
    assert same(generations, alone)


def test_speculation_changes_no_bit(model: GPTModel, alone: list[Generation]) -> None:
    for draft_tokens in (1, 5):
        engine = Engine(model, draft_tokens=draft_tokens, cache_tokens=CONTEXT * 9)
        assert same(run(engine, requests(40)), alone)
    forced = {7: 100.0}  # a text that repeats itself
    sampling = SamplingConfig(max_new_tokens=60, temperature=0.8)
    request = Request([1, 2, 3], sampling, logit_bias=forced, logprobs=2)
    engine, steps = Engine(model, draft_tokens=5), 0
    generation = engine.add(request)
    while engine.busy:
        engine.step()
        steps += 1
    assert steps < 20
    assert same([generation], run(Engine(model), [request]))


def test_threads_change_no_bit(model: GPTModel, alone: list[Generation]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same(run(Engine(model), requests(40)), alone)
    finally:
        torch.set_num_threads(threads)


def test_mean_vectors_have_the_same_bits(model: GPTModel) -> None:
    """Alone, among others, with prompts cut elsewhere and interrupted; they are the model's."""
    nothing_new = SamplingConfig(max_new_tokens=0)
    asked = [Request(r.prompt, nothing_new, mean_vector=True) for r in requests(12)]

    def vectors(engine: Engine, others: list[Request]) -> list[Tensor]:
        pairs = zip(asked, others, strict=True)
        generations = [engine.add(request) for pair in pairs for request in pair]
        assert [*engine.as_completed(generations)]
        return [g.mean_vector.value for g in generations[::2]]

    def mean(ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return model.hidden(torch.tensor([ids]))[0].float().mean(0)

    alone, engine = [], Engine(model)
    for request in asked:
        [generation] = run(engine, [request])
        assert generation.ids == []
        alone.append(generation.mean_vector.value)
        close = 1e-4 if alone[-1].dtype == next(model.parameters()).dtype else 0.05
        torch.testing.assert_close(alone[-1], mean(request.prompt), atol=close, rtol=close)
    for engine in (
        Engine(model),
        Engine(model, chunk=7, budget=7, max_batch_size=9),
        Engine(model, cache_tokens=CONTEXT + 64, max_batch_size=8, draft_tokens=5),
    ):
        for found, expected in zip(vectors(engine, requests(12)), alone, strict=True):
            assert torch.equal(found, expected)


def test_random_batches_change_no_bit() -> None:
    """Random models, cuts, drafts, batches and memory, cold and warm, in any order. `make soak`
    compares 10,000 requests."""
    choose, compared, reused = random.Random(0), 0, 0
    while compared < REQUESTS:
        model = make(choose.choice(list(CASES)))
        if not Engine(model).exact:
            pytest.skip("no compiled kernels on this machine")
        given = requests(TOGETHER, draw=compared)
        single, alone = Engine(model), []
        for request in given:
            alone += run(single, [request])
            single.refresh()
        engine = Engine(
            model,
            max_batch_size=choose.choice([2, 9, 32]),
            cache_tokens=choose.choice([CONTEXT + 64, 9 * CONTEXT, 40 * CONTEXT]),
            draft_tokens=choose.choice([0, 1, 5]),
            chunk=choose.choice([7, 33, 64, 256]),
            budget=choose.choice([7, 100, 512]),
        )
        for _ in ("cold", "warm"):
            order = choose.sample(range(TOGETHER), TOGETHER)
            found = run(engine, [given[i] for i in order])
            reused += sum(generation.cached_tokens for generation in found)
            assert same(found, [alone[i] for i in order])
        compared += TOGETHER
    assert reused > compared
    print(f"{compared:,} requests, each alone and twice in a batch: no bit differs")


def test_a_step_of_training_between_equal_requests_counts() -> None:
    model = make("llama fp32")
    engine = Engine(model)
    [before] = run(engine, requests(1))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    engine.refresh()
    [after] = run(engine, requests(1))
    assert after.cached_tokens == 0
    assert after.logprobs != before.logprobs
    assert same([after], run(Engine(model), requests(1)))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_generate(weights: str) -> None:
    model = make("llama bf16")
    if not Engine(model).exact:
        with pytest.raises(ValueError, match="need the compiled kernels"):
            Engine(model, weights=weights)
        return
    together = run(Engine(model, weights=weights), requests(9))
    single = [run(Engine(model, weights=weights), [request])[0] for request in requests(9)]
    assert same(together, single)

"""The policy: completions of a model in training by its present weights."""

import pytest
import torch
from chats import OURS
from random_weights import add_noise

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import attach, merge
from gptsmith.recipes.policy import Completion, Policy

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = OURS.tokenizer
STOP = [TOKENIZER.special_tokens["<|end|>"], *range(97, 110)]  # many ids end a completion
SAMPLING = SamplingConfig(max_new_tokens=12, temperature=1.0)
PROMPTS = [OURS.prompt([{"role": "user", "content": "x" * n}]) for n in (5, 90, 1, 70, 20)]
SEEDS = [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(len(PROMPTS))]


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=2, n_embd=32, context_length=128)
    model = GPTModel(ModelConfig(**size, vocab_size=TOKENIZER.vocab_size))
    add_noise(model, 0.1)
    return model.train()


def completed(
    model: GPTModel, batch_size: int = 256, weights: str = "auto"
) -> list[list[Completion]]:
    policy = Policy(model, TOKENIZER, STOP, 128, weights)
    assert policy.batch_size == 256
    policy.batch_size = batch_size
    policy.refresh()
    return policy.complete(PROMPTS, SAMPLING, SEEDS)


@pytest.mark.parametrize("weights", ["auto", "bfloat16"])
def test_completions_are_those_of_single_requests(model, weights):
    found = completed(model, batch_size=7, weights=weights)  # several rounds
    assert model.training
    ended = 0
    for prompt, seeds, group in zip(PROMPTS, SEEDS, found, strict=True):
        for seed, completion in zip(seeds, group, strict=True):
            engine = Engine(model, TOKENIZER, weights=weights)
            alone = engine.add(Request(prompt, SAMPLING.with_seed(seed), stop_ids=STOP))
            while engine.busy:
                engine.step()
            ids, text, finished = completion
            assert finished == (alone.finish_reason == "stop")
            assert ids[: len(alone.ids)] == alone.ids
            assert len(ids) == len(alone.ids) + finished
            assert not finished or ids[-1] in STOP
            assert text == alone.text
            ended += finished
    assert 0 < ended < 15


def test_a_refresh_follows_the_weights(model):
    policy = Policy(model, TOKENIZER, STOP, 128)
    policy.refresh()
    before = policy.complete(PROMPTS, SAMPLING, SEEDS)
    add_noise(model, 0.1)
    policy.refresh()
    after = policy.complete(PROMPTS, SAMPLING, SEEDS)
    assert before != after == completed(model)


def test_adapters_are_merged_for_sampling_and_the_model_stays_wrapped(model):
    attach(model, LoraConfig(rank=2))
    base = completed(model)
    add_noise(model, 0.05)
    policy = Policy(model, TOKENIZER, STOP, 128)
    policy.refresh()
    found = policy.complete(PROMPTS, SAMPLING, SEEDS)
    names = {name for name, _ in model.named_parameters()}
    assert any("lora_A" in name for name in names)
    reference = policy.without_adapters()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B.zero_()
        torch.testing.assert_close(reference(ids), model.eval()(ids))
    policy.refresh()
    assert policy.complete(PROMPTS, SAMPLING, SEEDS) == completed(model)
    assert found not in (base, completed(model))


def test_merged_adapters_complete_as_a_merged_model(model):
    attach(model, LoraConfig(rank=2))
    add_noise(model, 0.05)
    found = completed(model)
    merge(model)
    assert found == completed(model)

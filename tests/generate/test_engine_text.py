"""The text of requests: stop strings, characters split over tokens, prompts that are text."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from random_weights import model_in_float64
from torch import Tensor

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Generation, Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

CONFIG = ModelConfig(n_layer=2, n_head=4, n_embd=64, context_length=64, vocab_size=300)


@contextmanager
def saying(model: GPTModel, ids: list[int]) -> Iterator[None]:
    """The model says these ids, whatever it has read."""
    queue = list(ids)

    def head(module: object, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * 0 + model.head_weight[queue.pop(0)] * 1e3

    handle = model.final_norm.register_forward_hook(head)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def byte_model() -> GPTModel:
    model = model_in_float64(CONFIG)
    with torch.no_grad():  # ids that can be told apart
        model.embedding.token.weight.div_(model.embedding.token.weight.norm(dim=1, keepdim=True))
    return model


TEXT = "Grüße, 世界! She said: STOP it."
GREEDY = SamplingConfig(max_new_tokens=len(TEXT.encode()), temperature=0)


def test_stop_strings_are_found_across_tokens_and_never_shown(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()
    engine = Engine(byte_model, tokenizer)
    for stop, expected in [
        ((), TEXT),
        (("STOP",), "Grüße, 世界! She said: "),
        (("界",), "Grüße, 世"),
        (("said: STOP it. Now", "STXX"), TEXT),
        (("t.", "She"), "Grüße, 世界! "),
        (("G",), ""),
    ]:
        pieces: list[str] = []
        with saying(byte_model, tokenizer.encode(TEXT)):
            generation = engine.add(Request([1], GREEDY, stop, on_text=pieces.append))
            list(engine.as_completed([generation]))
        assert generation.text == expected == "".join(pieces)
        assert generation.finish_reason == ("length" if expected == TEXT else "stop")
        assert "\ufffd" not in generation.text
        assert tokenizer.decode(generation.ids).startswith(expected)


def test_a_character_cut_by_max_new_tokens_becomes_a_replacement(byte_model: GPTModel) -> None:
    with saying(byte_model, "ab世".encode()):
        config = SamplingConfig(max_new_tokens=4, temperature=0)
        [generation] = Engine(byte_model, Tokenizer.byte()).generate([[1]], config)
    assert generation.text == "ab\ufffd"


def test_ids_beyond_the_tokenizer_are_never_sampled(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()  # 257 ids, the model has 300
    config = SamplingConfig(max_new_tokens=200, temperature=100.0)
    [padded] = Engine(byte_model, tokenizer).generate([[1]], config, stop_ids=[])
    assert max(padded.ids) < tokenizer.vocab_size
    [whole] = Engine(byte_model).generate([[1]], config)
    assert max(whole.ids) >= tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"id 257 is outside the vocabulary 0\.\.256"):
        Engine(byte_model, tokenizer).generate([[257]], config)


def test_prompts_may_be_text(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()
    engine = Engine(byte_model, tokenizer)
    config = SamplingConfig(max_new_tokens=50, seed=3)
    texts = [g.text for g in engine.generate(["", "Once", "世"], config)]
    [alone] = engine.generate("Once", config.with_seed(4))  # a string is one prompt
    assert alone.text == texts[1]
    again = engine.generate("<|endoftext|>", config)
    assert again[0].text != texts[0]  # what is typed is plain text ...
    [start] = engine.generate([[tokenizer.eos_id]], config)
    assert start.text == texts[0]  # ... and an empty prompt is the special token
    with saying(byte_model, [*b"end", tokenizer.eos_id]):
        assert engine.generate("x", GREEDY)[0].text == "end"


def test_on_text_may_cancel_its_request() -> None:
    model, tokenizer = model_in_float64(CONFIG), Tokenizer.byte()
    engine = Engine(model, tokenizer)
    generations: list[Generation] = []
    config = SamplingConfig(max_new_tokens=6)
    for prompt in ([1, 2], [3]):
        cancel = lambda _: [engine.cancel(g) for g in generations]  # noqa: E731
        request = Request(prompt, config, stop_ids=(), on_text=cancel)
        generations.append(engine.add(request))
    list(engine.as_completed(generations))
    assert {g.finish_reason for g in generations} == {"cancelled"}
    assert not engine.busy

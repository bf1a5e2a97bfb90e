"""The same seeds give the same texts as before the engine took requests one by one: fixtures made
by commit a8ea690, in float64, with weights that depend on the names of the parameters alone."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.generate.chat import Chat
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

STORED = json.loads((Path(__file__).parent / "fixtures" / "texts.json").read_text())
CHAT_TOKENIZER = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)


def make(name: str) -> GPTModel:
    model = GPTModel(ModelConfig(**STORED["models"][name])).double()
    for parameter_name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(parameter_name.encode()))
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("max_batch_size", [1, 2, 32])
@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: case["name"])
def test_texts_equal_the_stored_ones(case: dict[str, Any], max_batch_size: int) -> None:
    tokenizer = Tokenizer.byte() if case["tokenizer"] else None
    engine = Engine(make(case["model"]), tokenizer, max_batch_size)
    sampling = SamplingConfig(**case["sampling"])
    seeds = case.get("seeds", range(sampling.seed, sampling.seed + len(case["prompts"])))
    generations = [
        engine.add(
            Request(
                prompt, sampling.with_seed(seed), case.get("stop", ()), case.get("stop_ids", ())
            )
        )
        for prompt, seed in zip(case["prompts"], seeds, strict=True)
    ]
    list(engine.as_completed(generations))
    for generation, expected in zip(generations, case["expected"], strict=True):
        assert generation.ids == expected["ids"]
        assert generation.text == expected["text"]
        assert generation.finish_reason == expected["finish"]
        assert generation.dropped_tokens == expected["dropped"]
        assert bool(generation.notice) == expected["notice"]


def test_texts_of_text_prompts_equal_the_stored_ones() -> None:
    stored = STORED["text"]
    engine = Engine(make("bytes"), Tokenizer.byte())
    generations = engine.generate(stored["prompts"], SamplingConfig(**stored["sampling"]))
    assert [generation.text for generation in generations] == stored["expected"]


@pytest.mark.parametrize("case", STORED["chat"], ids=lambda case: str(case["sampling"]))
def test_replies_equal_the_stored_ones(case: dict[str, Any]) -> None:
    template = ChatTemplate(TEMPLATE, CHAT_TOKENIZER)
    chat = Chat(make("chat"), CHAT_TOKENIZER, template)
    sampling = SamplingConfig(**case["sampling"])
    prompts = [chat.encode(messages, sampling) for messages in case["conversations"]]
    assert [len(prompt.messages) for prompt in prompts] == case["kept"]
    single = [chat.reply(messages, sampling) for messages in case["conversations"]]
    many = chat.reply_all([prompt.ids for prompt in prompts], sampling)
    for generations, stored in ((single, case["single"]), (many, case["many"])):
        found = [{"ids": g.ids, "text": g.text, "finish": g.finish_reason} for g in generations]
        assert found == stored

"""Accuracy per skill: counting, worked examples in a prompt, untrained models."""

import pytest
import torch
from rich.console import Console

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data import skills
from gptsmith.evaluate import skills as scoring
from gptsmith.generate.engine import Engine
from gptsmith.generate.request import Generation
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base() -> tuple[GPTModel, Tokenizer]:
    torch.manual_seed(0)
    tokenizer = Tokenizer.byte()
    config = ModelConfig.preset(
        "fast", n_layer=1, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size
    )
    return GPTModel(config), tokenizer


def test_correct_responses_are_counted_per_skill():
    items = skills.held_out(0, 4)

    responses = ["?" if item.skill == "reverse" else f" {item.answer}\n" for item in items]
    scores = scoring.score(responses, items)
    assert scores["reverse"] == (0, 4)
    assert {s for s, (right, total) in scores.items() if right == total == 4} == (
        set(skills.SKILLS) - {"reverse"}
    )
    assert scoring.mean(scores) == 1 - 1 / len(skills.SKILLS)


def test_untrained_model_scores_zero(base):
    model, tokenizer = base
    before = scoring.score_base(model, tokenizer, seed=0, per_skill=1)
    assert model.config.vocab_size == tokenizer.vocab_size  # as it was
    assert {name: scoring.mean(scores) for name, scores in before.items()} == {
        "untuned": 0,
        "with examples": 0,
    }
    grown = tokenizer.add_special_tokens(CHAT_TOKENS)
    config = model.config.change(vocab_size=grown.vocab_size)
    template = ChatTemplate(TEMPLATE, grown)
    after = scoring.score_chat(GPTModel(config), grown, template, seed=0, per_skill=1)
    assert [len(scores) for scores in after.values()] == [8, 8, 5, 2]
    console = Console(width=100)
    with console.capture() as said:
        console.print(scoring.table({**before, **after}))
    assert "reverse" in said.get()
    assert "facts held out" in said.get()


def test_prompt_shows_worked_examples_of_the_same_skill(base, monkeypatch):
    model, tokenizer = base
    prompts = []

    def generate(engine, given, sampling, *, stop):
        prompts.extend(given)
        return [Generation([], "x")] * len(given)

    monkeypatch.setattr(Engine, "generate", generate)
    items = skills.held_out(0, 3)
    scoring.few_shot(model, tokenizer, items, seed=0)
    limit = model.config.context_length - scoring.GREEDY.max_new_tokens
    shown = skills.worked_examples(0, scoring.EXAMPLES)
    for item, prompt in zip(items, prompts, strict=True):
        assert len(tokenizer.encode(prompt)) <= limit
        *examples, question = prompt.split("\n\n")
        assert question == scoring.transcript(item.messages)
        assert question.endswith("\nA:")
        if item.skill != "name":
            solved = [scoring.transcript(s.messages, s.answer) for s in shown]
            assert len(examples) >= 2
            assert set(examples) <= set(solved)

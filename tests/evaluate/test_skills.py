"""Accuracy per skill: counting, worked examples in a prompt, untrained models."""

import json
import re

import pytest
import torch
from rich.console import Console

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data import skills
from gptsmith.evaluate import skills as scoring
from gptsmith.generate.chat import Chat
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


def answering(monkeypatch, answer):
    """Replies of a chat are those of a function of the number of the prompt."""

    def replies(chat, prompts, sampling):
        return [Generation([], answer(i)) for i in range(len(prompts))]

    monkeypatch.setattr(Chat, "reply_all", replies)
    monkeypatch.setattr(scoring, "few_shot", lambda *_: [""] * 8 * 4)


def test_correct_responses_are_counted_per_skill(base, monkeypatch):
    items = skills.held_out(0, 4)
    answering(
        monkeypatch, lambda i: "?" if items[i].skill == "reverse" else f" {items[i].answer}\n"
    )
    result = scoring.score(*base, None, seed=0, per_skill=4)
    scores = result.details["by_skill"]["untuned"]
    assert scores["reverse"] == (0, 4)
    assert {s for s, (right, total) in scores.items() if right == total == 4} == (
        set(skills.SKILLS) - {"reverse"}
    )
    assert result.metrics == {
        "untuned": pytest.approx(1 - 1 / len(skills.SKILLS)), "with examples": 0,
    }  # fmt: skip
    assert result.n == len(result.items) == 2 * 4 * len(skills.SKILLS)
    assert [item["correct"] for item in result.items[:4]] == [items[0].skill != "reverse"] * 4
    json.dumps(result.fields() | {"items": result.items}, allow_nan=False)


def test_untrained_model_scores_zero(base):
    model, tokenizer = base
    before = scoring.score(model, tokenizer, None, seed=0, per_skill=1)
    assert model.config.vocab_size == tokenizer.vocab_size  # as it was
    assert before.metrics == {"untuned": 0, "with examples": 0}
    grown = tokenizer.add_special_tokens(CHAT_TOKENS)
    config = model.config.change(vocab_size=grown.vocab_size)
    template = ChatTemplate(TEMPLATE, grown)
    after = scoring.score(GPTModel(config), grown, template, seed=0, per_skill=1)
    columns = after.details["by_skill"]
    assert [len(scores) for scores in columns.values()] == [8, 8, 5, 2, 12]
    console = Console(width=100)
    with console.capture() as said:
        console.print(scoring.tables({**before.details["by_skill"], **columns}))
    assert "reverse" in said.get()
    assert "unknown function" in said.get()
    console = Console(width=80)
    with console.capture() as said:
        console.print(scoring.tables(columns, before=columns | {"held-out": {"reverse": (3, 4)}}))
    assert max(map(len, said.get().splitlines())) <= 80
    assert "…" not in said.get()
    rows = [re.findall(r"[\w%→ -]+", line) for line in said.get().splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row}
    assert cells["reverse"] == ["75% → 0%", "0% → 0%", "0% → 0%"]
    assert cells["count"][:2] == ["0%", "0% → 0%"]
    assert cells["modules"] == ["0% → 0%", ""]


def test_items_with_unknown_characters_are_left_out_and_counted(base, monkeypatch):
    every = [scoring.transcript(item.messages) for item in skills.held_out(0, 4)]
    tokenizer = Tokenizer.char(["".join(every).replace("7", "")])
    model = GPTModel(base[0].config.change(vocab_size=tokenizer.vocab_size))
    unknown = sum("7" in text for text in every)
    assert 0 < unknown < 32
    answering(monkeypatch, lambda i: "")
    monkeypatch.setattr(scoring, "few_shot", lambda _, __, items, *___: [""] * len(items))
    result = scoring.score(model, tokenizer, None, seed=0, per_skill=4)
    assert len(result.items) == 2 * (32 - unknown)
    assert f"skills: {2 * unknown} of 64 questions are left out: the tokenizer" in result.notes[0]
    assert "character '7'" in result.notes[0]


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

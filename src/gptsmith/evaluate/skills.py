"""How many answers are right, skill by skill: of a chat model, and of a model that is none yet.

An answer counts when it is the expected one, character by character, but for white space around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from gptsmith.chat_template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.data import skills
from gptsmith.data.skills import Item
from gptsmith.generate.chat import Chat
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.state_dict import resize_token_embeddings
from gptsmith.tokenizer import Tokenizer

Answer = Callable[[list[list[Message]]], list[str]]
Scores = dict[str, tuple[int, int]]  # skill -> right answers, of so many

EXAMPLES = 5  # that a prompt shows, if they fit
GREEDY = SamplingConfig(temperature=0, max_new_tokens=80)


def score_skills(answer: Answer, items: Sequence[Item]) -> Scores:
    """Right answers per skill; `answer` gets all conversations at once."""
    return _count(answer([item.messages for item in items]), items)


def score_chat(
    model: GPTModel, tokenizer: Tokenizer, template: ChatTemplate, seed: int, per_skill: int
) -> dict[str, Scores]:
    """A chat model on what training never showed it, by what is new: the arguments alone, the
    phrasing too, or the length of the words. Facts about Python stand apart: they are memory."""

    chat = Chat(model, tokenizer, template)

    def answer(conversations: list[list[Message]]) -> list[str]:
        return _replies(chat, conversations)

    return {
        "held-out": score_skills(answer, skills.held_out(seed, per_skill)),
        "other phrasings": score_skills(answer, skills.held_out(seed, per_skill, "phrasings")),
        "other lengths": score_skills(answer, skills.held_out(seed, per_skill, "lengths")),
        "facts": score_skills(answer, skills.fact_items(seed, per_skill)),
    }


def score_base(
    model: GPTModel, tokenizer: Tokenizer, seed: int, per_skill: int
) -> dict[str, Scores]:
    """A model before chat tuning: asked as a chat model is, with the vectors of the new tokens as
    tuning finds them, and in plain text behind a few worked examples."""
    items = skills.held_out(seed, per_skill)
    grown = tokenizer.add_special_tokens(CHAT_TOKENS)
    size = max(model.config.vocab_size, grown.vocab_size)
    chat = resize_token_embeddings(copy.deepcopy(model), size, tokenizer.vocab_size)
    untuned = Chat(chat, grown, ChatTemplate(TEMPLATE, grown))
    return {
        "untuned": score_skills(lambda c: _replies(untuned, c), items),
        "with examples": _count(few_shot(model, tokenizer, items, seed), items),
    }


def few_shot(model: GPTModel, tokenizer: Tokenizer, items: Sequence[Item], seed: int) -> list[str]:
    """The first line that the model writes after each question, worked examples of the same skill
    before it: as many, up to EXAMPLES, as leave room for an answer in the context."""
    room = model.config.context_length - GREEDY.max_new_tokens
    shown = skills.worked_examples(seed, EXAMPLES)
    prompts = []
    for item in items:
        solved = [transcript(s.messages, s.answer) for s in shown if s.skill == item.skill]
        prompt = transcript(item.messages)
        for text in solved:
            if len(tokenizer.encode(longer := f"{text}\n\n{prompt}")) > room:
                break
            prompt = longer
        prompts.append(prompt)
    generations = Engine(model, tokenizer).generate(prompts, GREEDY, stop=["\n"])
    return [generation.text for generation in generations]


def _replies(chat: Chat, conversations: list[list[Message]]) -> list[str]:
    prompts = [chat.encode(messages, GREEDY).ids for messages in conversations]
    return [reply.text for reply in chat.reply_all(prompts, GREEDY)]


def transcript(messages: Sequence[Message], answer: str = "") -> str:
    """A conversation in plain text, `Q: ...` and `A: ...` by turns, up to where the answer goes."""
    signs = {"user": "Q:", "assistant": "A:"}
    lines = [f"{signs[message['role']]} {message['content']}" for message in messages]
    return "\n".join([*lines, f"A: {answer}".rstrip()])


def mean(scores: Scores) -> float:
    """Share of right answers, every skill counting the same."""
    return sum(right / total for right, total in scores.values()) / len(scores)


def table(columns: Mapping[str, Scores]) -> Table:
    """Skills downwards, measurements beside each other, in per cent."""
    shown = Table("skill", *columns)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys(name for scores in columns.values() for name in scores):
        shares = (scores.get(name) for scores in columns.values())
        shown.add_row(name, *(f"{s[0] / s[1]:.0%}" if s else "" for s in shares))
    shown.add_section()
    shown.add_row("mean", *(f"{mean(scores):.0%}" for scores in columns.values()))
    return shown


def _count(given: Sequence[str], items: Sequence[Item]) -> Scores:
    scores: Scores = {}
    for answer, item in zip(given, items, strict=True):
        right, total = scores.get(item.skill, (0, 0))
        scores[item.skill] = right + (answer.strip() == item.answer), total + 1
    return scores

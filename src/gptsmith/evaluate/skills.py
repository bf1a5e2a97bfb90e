"""Accuracy per skill of the built-in chat set, for chat models and for base models.

A response is correct if it equals the expected answer, except for white space at the ends.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from rich.table import Table

from gptsmith.arguments import check_several
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.data import skills
from gptsmith.data.skills import Item
from gptsmith.generate.chat import Chat
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.state_dict import resize_token_embeddings
from gptsmith.tokenizer import Tokenizer

Scores = dict[str, tuple[int, int]]  # skill -> correct responses, all responses

EXAMPLES = 5  # worked examples in a prompt, if they fit
GREEDY = SamplingConfig(temperature=0, max_new_tokens=80)


def score(responses: Sequence[str], items: Sequence[Item]) -> Scores:
    """Correct responses per skill."""
    check_several(responses, "responses")
    scores: Scores = {}
    for response, item in zip(responses, items, strict=True):
        correct, total = scores.get(item.skill, (0, 0))
        scores[item.skill] = correct + (response.strip() == item.answer), total + 1
    return scores


def score_chat(
    model: GPTModel, tokenizer: Tokenizer, template: ChatTemplate, seed: int, per_skill: int
) -> dict[str, Scores]:
    """A chat model on held-out items: with new arguments, also new phrasings, or new word lengths.

    Facts about Python are separate, because they can only be memorised.
    """
    chat = Chat(model, tokenizer, template)
    columns = {
        "held-out": skills.held_out(seed, per_skill),
        "other phrasings": skills.held_out(seed, per_skill, "phrasings"),
        "other lengths": skills.held_out(seed, per_skill, "lengths"),
        "facts": skills.fact_items(seed, per_skill),
    }
    return {name: score(_replies(chat, items), items) for name, items in columns.items()}


def score_base(
    model: GPTModel, tokenizer: Tokenizer, seed: int, per_skill: int
) -> dict[str, Scores]:
    """A base model on held-out items, in two ways.

    untuned: as a chat model, with the embeddings of the chat tokens that tuning starts from. with
    examples: in plain text, after a few worked examples.
    """
    items = skills.held_out(seed, per_skill)
    with_chat_tokens = tokenizer.add_special_tokens(CHAT_TOKENS)
    V = max(model.config.vocab_size, with_chat_tokens.vocab_size)
    resized = resize_token_embeddings(copy.deepcopy(model), V, tokenizer.vocab_size)
    chat = Chat(resized, with_chat_tokens, ChatTemplate(TEMPLATE, with_chat_tokens))
    return {
        "untuned": score(_replies(chat, items), items),
        "with examples": score(few_shot(model, tokenizer, items, seed), items),
    }


def _replies(chat: Chat, items: Sequence[Item]) -> list[str]:
    prompts = [chat.encode(item.messages, GREEDY).ids for item in items]
    return [reply.text for reply in chat.reply_all(prompts, GREEDY)]


def few_shot(model: GPTModel, tokenizer: Tokenizer, items: Sequence[Item], seed: int) -> list[str]:
    """The first line that the model writes after each question.

    The prompt starts with up to EXAMPLES worked examples of the same skill, as many as leave room
    for an answer in the context.
    """
    room = model.config.context_length - GREEDY.max_new_tokens
    examples = skills.worked_examples(seed, EXAMPLES)
    prompts = []
    for item in items:
        solved = [transcript(e.messages, e.answer) for e in examples if e.skill == item.skill]
        prompt = transcript(item.messages)
        for text in solved:
            if len(tokenizer.prompt(longer := f"{text}\n\n{prompt}")) > room:
                break
            prompt = longer
        prompts.append(prompt)
    generations = Engine(model, tokenizer).generate(prompts, GREEDY, stop=["\n"])
    return [generation.text for generation in generations]


def transcript(messages: Sequence[Message], answer: str = "") -> str:
    """A conversation as plain text, alternating `Q: ...` and `A: ...`, up to the answer."""
    speakers = {"user": "Q:", "assistant": "A:"}
    lines = [f"{speakers[message['role']]} {message['content']}" for message in messages]
    return "\n".join([*lines, f"A: {answer}".rstrip()])


def mean(scores: Scores) -> float:
    """Mean accuracy over the skills; each skill counts the same."""
    return sum(correct / total for correct, total in scores.values()) / len(scores)


def table(columns: Mapping[str, Scores]) -> Table:
    """Accuracy in per cent, a row per skill, a column per measurement."""
    shown = Table("skill", *columns)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys(name for scores in columns.values() for name in scores):
        shares = (scores.get(name) for scores in columns.values())
        shown.add_row(name, *(f"{s[0] / s[1]:.0%}" if s else "" for s in shares))
    shown.add_section()
    shown.add_row("mean", *(f"{mean(scores):.0%}" for scores in columns.values()))
    return shown

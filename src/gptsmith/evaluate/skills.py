"""Accuracy per skill of the built-in chat set, for chat models and for base models.

A response is correct if it equals the expected answer, except for white space at the ends.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Column, Table

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.data import skills
from gptsmith.data.skills import Item
from gptsmith.evaluate.result import Item as Row
from gptsmith.evaluate.result import (
    Result,
    Statistic,
    encodable_indices,
    left_out_note,
    mean_share,
    prompt_form,
)
from gptsmith.generate.chat import Chat
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.state_dict import resize_token_embeddings
from gptsmith.tokenizer import Tokenizer

Scores = dict[str, tuple[int, int]]  # skill -> correct responses, all responses

EXAMPLES = 5  # worked examples in a prompt, if they fit
GREEDY = SamplingConfig(temperature=0, max_new_tokens=80)


def score(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    per_skill: int,
    weights: str = "auto",
) -> Result:
    """Accuracy, averaged over the skills, in several measurements.

    A chat model answers held-out items with new arguments, and also with new phrasings or word
    lengths. Facts about Python are separate, because they can only be memorised, and so are
    everyday turns, among them questions that it should say it cannot answer. A base model
    (template None) answers held-out items as a chat model would, with the initial embeddings of the
    chat tokens (untuned), and in plain text after a few worked examples. Items that the tokenizer
    cannot encode are left out, with a note. per_skill: items of a skill; of the kinds of everyday
    turns, each different one once, which may be fewer. weights: see Engine.
    """
    if template is None:
        held_out = skills.held_out(seed, per_skill)
        measured = {"untuned": held_out, "with examples": held_out}
        chat = _untuned(model, tokenizer, weights)
    else:
        measured = {
            "held-out": skills.held_out(seed, per_skill),
            "other phrasings": skills.held_out(seed, per_skill, "phrasings"),
            "other lengths": skills.held_out(seed, per_skill, "lengths"),
            "facts": skills.fact_items(seed, per_skill),
            "everyday": skills.everyday_items(seed, per_skill),
        }
        chat = Chat(model, tokenizer, template, Engine(model, tokenizer, weights=weights))
    rows, unknown = [], list[str]()
    why = ""
    for name, items in measured.items():
        asked = [
            transcript(item.messages) if template is None
            else "\n".join(message["content"] for message in item.messages)
            for item in items
        ]  # fmt: skip
        known, problem = encodable_indices(tokenizer, asked)
        why = why or problem
        unknown += [f"{name} {i + 1}" for i in range(len(items)) if i not in {*known}]
        if name == "with examples":
            responses = few_shot(model, tokenizer, [items[i] for i in known], seed, weights)
        else:
            prompts = [chat.encode(items[i].messages, GREEDY).ids for i in known]
            responses = [reply.text for reply in chat.reply_all(prompts, GREEDY)]
        rows += [
            {
                "id": f"{name} {i + 1}",
                "measured": name,
                "skill": items[i].skill,
                "question": items[i].messages[-1]["content"],
                "answer": items[i].answer,
                "response": response,
                "correct": is_correct(response, items[i].answer),
            }
            for i, response in zip(known, responses, strict=True)
        ]
    notes = [left_out_note("skills", unknown, len(rows) + len(unknown), why)] if unknown else []
    if not rows:
        raise ValueError(notes[0])
    scores = by_skill(rows)
    return Result.from_items(
        "skills", rows, list(scores), notes=notes, details={"by_skill": scores},
        statistics={name: _mean_over_skills(name) for name in scores},
        conditions={"prompt": prompt_form(None if template is None else template.source)},
    )  # fmt: skip


def is_correct(response: str, answer: str) -> bool:
    """Whether a response is the expected answer, except for white space at the ends."""
    return response.strip() == answer.strip()


def by_skill(rows: Sequence[Row]) -> dict[str, Scores]:
    """Correct and all responses by measurement and skill, of the items of a result."""
    scores: dict[str, Scores] = defaultdict(dict)
    for row in rows:
        correct, total = scores[row["measured"]].get(row["skill"], (0, 0))
        scores[row["measured"]][row["skill"]] = correct + row["correct"], total + 1
    return dict(scores)


def _mean_over_skills(measured: str) -> Statistic:
    def columns(rows: Sequence[Row]) -> np.ndarray:
        """Which skill each item of the measurement is of (n, K), and its correct answers (n, K)."""
        mine = [row for row in rows if row["measured"] == measured]
        names = sorted({row["skill"] for row in mine})
        asked = np.array([[row["skill"] == name for name in names] for row in mine])
        return np.hstack([asked, asked & [[row["correct"]] for row in mine]])

    def value(means: np.ndarray) -> Any:
        asked, correct = np.split(means, 2, axis=-1)
        return mean_share(correct, asked)

    return Statistic(columns, value)


def _untuned(model: GPTModel, tokenizer: Tokenizer, weights: str) -> Chat:
    with_chat_tokens = tokenizer.add_special_tokens(CHAT_TOKENS)
    V = max(model.config.vocab_size, with_chat_tokens.vocab_size)
    resized = resize_token_embeddings(copy.deepcopy(model), V, tokenizer.vocab_size)
    engine = Engine(resized, with_chat_tokens, weights=weights)
    return Chat(resized, with_chat_tokens, ChatTemplate(TEMPLATE, with_chat_tokens), engine)


def few_shot(
    model: GPTModel,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    seed: int,
    weights: str = "auto",
) -> list[str]:
    """The first line that the model generates after each question.

    The prompt starts with up to EXAMPLES worked examples of the same skill, as many as fit into the
    context together with an answer.
    """
    room = model.config.context_length - GREEDY.max_new_tokens
    examples = skills.worked_examples(seed, EXAMPLES)
    solved = [transcript(e.messages, e.answer) for e in examples]
    known, _ = encodable_indices(tokenizer, solved)
    prompts = []
    for item in items:
        prompt = transcript(item.messages)
        for text in (solved[i] for i in known if examples[i].skill == item.skill):
            if len(tokenizer.prompt(longer := f"{text}\n\n{prompt}")) > room:
                break
            prompt = longer
        prompts.append(prompt)
    engine = Engine(model, tokenizer, weights=weights)
    generations = engine.generate(prompts, GREEDY, stop=["\n"])
    return [generation.text for generation in generations]


def transcript(messages: Sequence[Message], answer: str = "") -> str:
    """A conversation as plain text, alternating `Q: ...` and `A: ...`, up to the answer."""
    speakers = {"user": "Q:", "assistant": "A:"}
    lines = [f"{speakers[message['role']]} {message['content']}" for message in messages]
    return "\n".join([*lines, f"A: {answer}".rstrip()])


def tables(columns: Mapping[str, Scores], before: Mapping[str, Scores] | None = None) -> Group:
    """Accuracy in per cent, a row per skill, a column per measurement, and their means; facts and
    everyday turns below, in a table of their own.

    before: the same measurements of an earlier model, shown in front: `84% → 96%`.
    """
    known = set(skills.SKILLS)
    of_skills = {name: scores for name, scores in columns.items() if scores.keys() & known}
    others = {name: scores for name, scores in columns.items() if name not in of_skills}
    parts = (("skill", of_skills), ("question", others))
    return Group(*(_table(first, part, before or {}) for first, part in parts if part))


def _table(first: str, columns: Mapping[str, Scores], before: Mapping[str, Scores]) -> Table:
    shown = Table(first, *(Column(name, justify="right") for name in columns))
    earlier, now = (
        {name: _shares(scores) for name, scores in measured.items()}
        for measured in (before, columns)
    )
    for row in [*dict.fromkeys(skill for scores in columns.values() for skill in scores), "mean"]:
        if row == "mean":
            shown.add_section()
        cells = ((earlier.get(name, {}).get(row), now[name].get(row)) for name in columns)
        shown.add_row(row, *(_change(*cell) for cell in cells))
    return shown


def _shares(scores: Scores) -> dict[str, float]:
    """Skill -> share of correct responses, and `mean`, that of the skills."""
    shares = {skill: right / total for skill, (right, total) in scores.items()}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def _change(*shares: float | None) -> str:
    """`84% → 96%`, without what is not known."""
    return " → ".join(f"{share:.0%}" for share in shares if share is not None)

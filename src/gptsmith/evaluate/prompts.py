"""Rows of multiple-choice sets -> questions, in the words of lm-evaluation-harness 0.4.13.

tasks.py lists the forms of row. A function here gives None for a row of none of its forms, and
raises ValueError with file and line for one that is damaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gptsmith.data.rows import Row, check_unicode

Choices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Question:
    """Which of these continuations does the model find the likeliest?

    id: its own, else file:line. choices: pairs of context and continuation, which begins with the
    space between the two; LAMBADA has one. answer: the place of the right one, from 0.
    """

    id: str
    choices: Choices
    answer: int


Made = tuple[Choices, int] | None


def hellaswag(row: Row) -> Made:
    if not _has(row, "ctx_a", "ctx_b", "activity_label", "endings", "label"):
        return None
    begun = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    context = _clean(f"{_text(row, 'activity_label')}: {begun}")
    endings = [_clean(text) for text in _texts(row, "endings")]
    return _after(context, endings), _number(row, "label")


def hellaswag_gpt2(row: Row) -> Made:
    if not _has(row, "ctx", "endings", "label"):
        return None
    return _after(_text(row, "ctx"), _texts(row, "endings")), _number(row, "label")


def _clean(text: str) -> str:
    """Without the marks of WikiHow, as the harness removes them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc(row: Row) -> Made:
    if _has(row, "query", "choices", "gold"):
        return _common(row)
    question, choices = row.values.get("question"), row.values.get("choices")
    if isinstance(question, dict):  # AI2's original: a list of objects
        stem, listing = _text(row, "stem", question), question.get("choices")
        if not isinstance(listing, list) or not all(isinstance(one, dict) for one in listing):
            raise ValueError(f"{row.place}: 'choices' of 'question' is no list of objects")
        choices = {key: [one.get(key) for one in listing] for key in ("text", "label")}
    elif isinstance(question, str) and isinstance(choices, dict):
        stem = question
    else:
        return None
    texts, labels = _texts(row, "text", choices), _texts(row, "label", choices)
    key = _text(row, "answerKey")
    answer = labels.index(key) if key in labels else -1
    return _after(f"Question: {stem}\nAnswer:", texts), answer


def piqa(row: Row) -> Made:
    if _has(row, "query", "choices", "gold"):
        return _common(row)
    if not _has(row, "goal", "sol1", "sol2", "label"):
        return None
    context = f"Question: {_text(row, 'goal')}\nAnswer:"
    return _after(context, (_text(row, "sol1"), _text(row, "sol2"))), _number(row, "label")


def winogrande(row: Row) -> Made:
    """The choices end the context, the continuation is the same (Trinh and Le 2018)."""
    if _has(row, "context_options", "continuation", "gold"):
        contexts = _texts(row, "context_options")
        rest, answer = _text(row, "continuation"), _number(row, "gold")
    elif _has(row, "sentence", "option1", "option2", "answer"):
        before, gap, rest = _text(row, "sentence").partition("_")
        if not gap:
            raise ValueError(f"{row.place}: 'sentence' has no _ where the choice goes")
        contexts = [before + _text(row, name) for name in ("option1", "option2")]
        rest, answer = rest.strip(), _number(row, "answer") - 1
    else:
        return None
    return tuple((context, f" {rest}") for context in contexts), answer


def lambada(row: Row) -> Made:
    if _has(row, "context", "continuation"):
        context, word = _text(row, "context"), _text(row, "continuation")
    elif _has(row, "text"):
        context, _, word = _text(row, "text").rpartition(" ")
    else:
        return None
    if not (context.strip() and word.strip()):
        raise ValueError(f"{row.place}: no text with a last word behind it")
    return _after(context, (word,)), 0


LETTERS = ("A", "B", "C", "D")


def mmlu(row: Row) -> tuple[str, str] | None:
    """A question up to where its answer goes, and the answer's letter."""
    if _has(row, "question", *LETTERS, "answer"):
        choices = [_text(row, letter) for letter in LETTERS]
    elif _has(row, "question", "choices", "answer"):
        choices = _texts(row, "choices")
    else:
        return None
    answer = row.values["answer"]
    if answer not in LETTERS:
        number = _number(row, "answer")
        answer = LETTERS[number] if number < len(LETTERS) else None
    if answer is None or len(choices) != len(LETTERS):
        raise ValueError(f"{row.place}: not four choices and one of them the answer")
    options = [f"{letter}. {text}\n" for letter, text in zip(LETTERS, choices, strict=True)]
    return f"{_text(row, 'question').strip()}\n{''.join(options)}Answer:", answer


def _common(row: Row) -> Made:
    """llm-foundry's form; its queries of PIQA end in a line feed."""
    context = _text(row, "query").removesuffix("\n") + "\nAnswer:"
    return _after(context, _texts(row, "choices")), _number(row, "gold")


def _after(context: str, continuations: Iterable[str]) -> Choices:
    return tuple((context, f" {text}") for text in continuations)


def _has(row: Row, *names: str) -> bool:
    return all(name in row.values for name in names)


def _text(row: Row, name: str, values: Mapping[str, Any] | None = None) -> str:
    value = (row.values if values is None else values).get(name)
    if not isinstance(value, str):
        raise ValueError(f"{row.place}: {name!r} is {value!r:.40}, not a text")
    check_unicode(row, name, value)
    return value


def _texts(row: Row, name: str, values: Mapping[str, Any] | None = None) -> list[str]:
    value = (row.values if values is None else values).get(name)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{row.place}: {name!r} is {value!r:.40}, not a list of two or more texts")
    for text in value:
        check_unicode(row, name, text)
    return value


def _number(row: Row, name: str) -> int:
    """A label, which some files have as text."""
    value = row.values.get(name)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,3}", str(value)):
        raise ValueError(
            f"{row.place}: {name!r} is {value!r:.40}, not a number of a choice; a test set"
            " without answers cannot be scored: take the validation set"
        )
    return int(str(value))

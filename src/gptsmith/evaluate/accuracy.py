"""Accuracy on multiple-choice tasks: the model's answer is the choice with the highest likelihood.

    acc        by the sum of the log-probabilities
    acc_norm   by the sum divided by the characters of the choice, without its leading space, as in
               lm-evaluation-harness
    acc_token  by the mean over tokens, as in the reproductions of GPT-2

For tasks with a single continuation (LAMBADA's last word), acc is the share of items that greedy
decoding gets right, and perplexity is exp of the mean negative log-probability of a word.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from gptsmith.evaluate.likelihood import Likelihood, Request, encode_pairs, log_likelihoods
from gptsmith.evaluate.multiple_choice import Question, Task
from gptsmith.evaluate.result import Result, Statistic, chance, exp, left_out_note
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_target
from gptsmith.tokenizer import Tokenizer

WORD_PERPLEXITY = Statistic(
    lambda items: [item["nats"] for item in items], lambda means: exp(-means[..., 0])
)


def score(
    model: GPTModel,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    *,
    progress: bool = False,
) -> Result:
    """Score the questions. The items contain the nats and tokens of every choice and its scores.

    The model's mode (train or eval) is restored. progress: show it on stderr.
    Notes and errors are those of `select`.
    """
    selected, notes = select(model, tokenizer, task.name, questions)
    found = iter(
        log_likelihoods(
            model,
            [request for _, requests in selected for request in requests],
            tokenizer.vocab_size,
            title=task.name if progress else None,
        )
    )
    items = [
        _item(task, question, requests, list(islice(found, len(requests))))
        for question, requests in selected
    ]
    return Result.from_items(
        task.name,
        items,
        task.metrics,
        notes=[*task.notes, *notes],
        references=references(task, [question for question, _ in selected]),
        statistics={"perplexity": WORD_PERPLEXITY},
    )


def references(task: Task, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Scores to compare with, by metric and name, as far as they are known.

    chance: the accuracy of guessing on these questions, whose numbers of choices may differ.
    """
    choices = [len(question.choices) for question in questions]
    guessing = {"chance": chance(choices)} if min(choices, default=1) > 1 else {}
    published = {metric: {"GPT-2 124M": value} for metric, value in task.gpt2.items()}
    return {
        metric: (guessing if metric.startswith("acc") else {}) | published.get(metric, {})
        for metric in task.metrics
    }


def select(
    model: GPTModel, tokenizer: Tokenizer, name: str, questions: Sequence[Question]
) -> tuple[list[tuple[Question, list[Request]]], list[str]]:
    """The questions that the model can be scored on, with the tokens of their choices, and notes.

    A question is left out, with a note, if the tokenizer cannot encode it or merges one of its
    choices into the context without a token of its own; if a choice is longer than the model's
    context; or if the mask would reveal the answer (prefix(n) with a question of fewer than n
    tokens). Longer questions are truncated on the left, with a note. ValueError if no question is
    left, and for a mask other than prefix(n) that lets a token see later ones.
    """
    C = model.config.context_length
    # Tokens before this position see later ones, and would see the answer: prefix(n).
    start = first_target(model.mask, C, model.config.n_head, model.config.n_layer)
    selected: list[tuple[Question, list[Request]]] = []
    unscored: dict[str, list[str]] = defaultdict(list)  # reason -> ids
    unknown, truncated = "", 0
    for question in questions:
        try:
            requests = encode_pairs(tokenizer, question.choices)
        except ValueError as error:  # a character that the tokenizer does not know
            unknown = unknown or f"the tokenizer cannot encode them ({error})"
            unscored[unknown].append(question.id)
            continue
        if not all(request.continuation for request in requests):
            reason = (
                "the tokenizer joins a choice to the end of the question, without its own token"
            )
        elif any(len(request.continuation) > C for request in requests):
            reason = f"they have choices longer than the model's context of {C} tokens"
        elif any(min(len(r.context), C + 1 - len(r.continuation)) <= start for r in requests):
            reason = f"choices have fewer than {start + 1} tokens before them, which the mask needs"
            reason += f" within the model's context of {C} tokens"
        else:
            selected.append((question, requests))
            truncated += any(len(r.context) + len(r.continuation) > C + 1 for r in requests)
            continue
        unscored[reason].append(question.id)
    notes = [left_out_note(name, ids, len(questions), reason) for reason, ids in unscored.items()]
    if truncated:
        notes.append(
            f"{name}: {truncated:,} of {len(questions):,} questions are truncated on the left: "
            f"they are longer than the model's context of {C} tokens"
        )
    if not selected:
        raise ValueError("; ".join(notes) if notes else f"{name}: no questions")
    return selected, notes


def _item(
    task: Task, question: Question, requests: Sequence[Request], found: Sequence[Likelihood]
) -> dict[str, Any]:
    nats = [likelihood.nats for likelihood in found]
    tokens = [len(request.continuation) for request in requests]
    item: dict[str, Any] = {
        "id": question.id,
        "answer": question.answer,
        "nats": nats,
        "tokens": tokens,
    }
    if len(nats) == 1:
        return item | {"acc": float(found[0].greedy)}
    lengths = {
        "acc": [1] * len(nats),
        "acc_norm": [len(text.removeprefix(" ")) for _, text in question.choices],
        "acc_token": tokens,
    }
    return item | {m: _correct(nats, lengths[m], question.answer) for m in task.metrics}


def _correct(nats: Sequence[float], lengths: Sequence[int], answer: int) -> float:
    """1.0 if the answer has the highest nats per unit of length, the first one of equals.

    An empty choice is never taken; a model that gives NaN takes none.
    """
    values = [n / length if length else -math.inf for n, length in zip(nats, lengths, strict=True)]
    return float(not np.isnan(values).any() and int(np.argmax(values)) == answer)

"""Accuracy on multiple-choice tasks: the answer is the choice that the model finds likeliest.

    acc        by the sum of the log-probabilities
    acc_norm   by the sum divided by the characters of the choice, without its leading space, as in
               lm-evaluation-harness
    acc_token  by the mean over tokens, as in the reproductions of GPT-2

Where there is one continuation (LAMBADA's last word), acc is the share that greedy decoding would
produce, and perplexity is exp of the mean negative log-probability of a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

from gptsmith.evaluate.likelihood import Likelihood, Request, encode_pairs, log_likelihoods
from gptsmith.evaluate.multiple_choice import Question, Task
from gptsmith.evaluate.report import Result, mean
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_target
from gptsmith.tokenizer import Tokenizer


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
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for metric in task.metrics:
        if metric == "perplexity":
            loss, error = mean([-item["nats"][0] for item in items])
            metrics[metric] = math.exp(min(loss, 700))
            stderr[metric] = metrics[metric] * error  # to first order
        else:
            metrics[metric], stderr[metric] = mean([item[metric] for item in items])
    references = {metric: task.references(metric) for metric in task.metrics}
    return Result(task.name, len(items), metrics, stderr, items, notes=notes, references=references)


def select(
    model: GPTModel, tokenizer: Tokenizer, name: str, questions: Sequence[Question]
) -> tuple[list[tuple[Question, list[Request]]], list[str]]:
    """The questions that the model can be scored on, with the tokens of their choices, and notes.

    Left out, with a note: questions with a choice longer than the model's context, and those whose
    answer the mask would reveal (prefix(n), for a context of fewer than n tokens). Longer questions
    are truncated on the left, with a note. ValueError if no question is left, and for a mask other
    than prefix(n) that lets a token see later ones.
    """
    requests = encode_pairs(tokenizer, [pair for q in questions for pair in q.choices])
    ends = accumulate((len(question.choices) for question in questions), initial=0)
    by_question = [requests[start:end] for start, end in pairwise(ends)]
    C = model.config.context_length
    # Tokens before this position see later ones, and would see the answer: prefix(n).
    start = first_target(model.mask, C, model.config.n_head, model.config.n_layer)
    selected = [
        (question, choices)
        for question, choices in zip(questions, by_question, strict=True)
        if all(min(len(r.context), C + 1 - len(r.continuation)) > start for r in choices)
    ]
    notes = []
    if left_out := len(questions) - len(selected):
        mask = f", or fewer than {start + 1} tokens before them, which the mask needs"
        notes.append(
            f"{name}: {left_out:,} of {len(questions):,} questions are left out: they have choices "
            f"longer than the model's context of {C} tokens{mask if start else ''}"
        )
    # The last token of a text is not read.
    truncated = sum(any(sum(map(len, r)) > C + 1 for r in choices) for _, choices in selected)
    if truncated:
        notes.append(
            f"{name}: {truncated:,} of {len(questions):,} questions are truncated on the "
            f"left: they are longer than the model's context of {C} tokens"
        )
    if not selected:
        raise ValueError(notes[0] if notes else f"{name}: no questions")
    return selected, notes


def _item(
    task: Task, question: Question, requests: Sequence[Request], found: Sequence[Likelihood]
) -> dict[str, Any]:
    nats = [likelihood.nats for likelihood in found]
    tokens = [len(request.continuation) for request in requests]
    item = {"id": question.id, "answer": question.answer, "nats": nats, "tokens": tokens}
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

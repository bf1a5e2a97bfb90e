"""Multiple choice by log-likelihood: the answer is the continuation that the model finds likeliest.

    acc        by the sum of the log-probabilities
    acc_norm   by that over the characters of the choice, its leading space not counted, as
               lm-evaluation-harness has it
    acc_token  by the mean over tokens, as the reproductions of GPT-2 have it

LAMBADA has one continuation, the last word: acc is the share that greedy decoding would have
written, perplexity exp of the mean negative log-probability of a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

from gptsmith.evaluate.likelihood import Likelihood, Request, log_likelihoods
from gptsmith.evaluate.prompts import Question
from gptsmith.evaluate.report import Result, mean
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_scored
from gptsmith.tokenizer import Tokenizer

# Where all choices are one text or one letter, it makes no difference what the sum is divided by.
_SUM_ONLY = ("winogrande", "mmlu")


def score(
    model: GPTModel,
    tokenizer: Tokenizer,
    name: str,
    questions: Sequence[Question],
    *,
    progress: bool = False,
) -> Result:
    """Ask the questions of the task `name`; the items of the result are those, with the nats and
    tokens of every choice and what was right.

    The model is left in the mode it was found in. progress: say on stderr how far this is. The
    rest as `askable`.
    """
    asked, notes = askable(model, tokenizer, name, questions)
    found = iter(
        log_likelihoods(
            model,
            [request for _, of_one in asked for request in of_one],
            tokenizer.vocab_size,
            title=name if progress else None,
        )
    )
    items = [_item(name, q, of_one, list(islice(found, len(of_one)))) for q, of_one in asked]
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for metric in ("acc", "acc_norm", "acc_token"):
        if metric in items[0]:
            metrics[metric], stderr[metric] = mean([item[metric] for item in items])
    if name == "lambada":
        loss, error = mean([-item["nats"][0] for item in items])
        metrics["perplexity"] = math.exp(min(loss, 700))
        stderr["perplexity"] = metrics["perplexity"] * error  # to first order
    return Result(name, len(items), metrics, stderr, items, notes=notes)


def askable(
    model: GPTModel, tokenizer: Tokenizer, name: str, questions: Sequence[Question]
) -> tuple[list[tuple[Question, list[Request]]], list[str]]:
    """The questions that this model can be asked, with their choices as tokens, and what there is
    to say about it.

    A question with a choice longer than the model's context is left out, one that is longer itself
    loses its beginning, both with a note. ValueError if all are left out, and for a mask that lets
    tokens see what comes after them, but for prefix(n).
    """
    pairs = [pair for question in questions for pair in question.choices]
    requests = encode_pairs(tokenizer, pairs)
    places = accumulate((len(question.choices) for question in questions), initial=0)
    spans = [slice(*span) for span in pairwise(places)]  # of each question's choices in the pairs
    C = model.config.context_length
    # Up to here a token sees those that come after it, and would see the answer: prefix(n).
    start = first_scored(model.mask, C, model.config.n_head, model.config.n_layer)
    asked = [
        (question, requests[span])
        for question, span in zip(questions, spans, strict=True)
        if all(min(len(r.context), C + 1 - len(r.continuation)) > start for r in requests[span])
    ]
    notes = []
    if left_out := len(questions) - len(asked):
        notes = [
            f"{name}: {left_out:,} of {len(questions):,} questions are left out, they have choices "
            f"longer than the model's context of {C} tokens"
            + (
                f", or less than {start + 1} tokens before them, which the mask needs"
                if start
                else ""
            )
        ]
    # The last token is not read.
    cut = sum(any(sum(map(len, r)) > C + 1 for r in of_one) for _, of_one in asked)
    if cut:
        notes.append(
            f"{name}: {cut:,} of {len(questions):,} questions are asked without their beginning, "
            f"more than {C} tokens do not fit into the model's context"
        )
    if not asked:
        raise ValueError(notes[0] if notes else f"{name}: no questions")
    return asked, notes


def _item(
    name: str, question: Question, requests: Sequence[Request], found: Sequence[Likelihood]
) -> dict[str, Any]:
    nats = [likelihood.nats for likelihood in found]
    tokens = [len(request.continuation) for request in requests]
    item = {"id": question.id, "answer": question.answer, "nats": nats, "tokens": tokens}
    if name == "lambada":
        return item | {"acc": float(found[0].greedy)}
    item["acc"] = _right(nats, question.answer)
    if name not in _SUM_ONLY:
        characters = [len(text.removeprefix(" ")) for _, text in question.choices]
        item["acc_norm"] = _right(_over(nats, characters), question.answer)
        item["acc_token"] = _right(_over(nats, tokens), question.answer)
    return item


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Contexts and continuations as tokens of the text that they are together, cut where the tokens
    of the context end; spaces at the context's end go with the continuation.

    What the tokenizer puts before a text stands before the context, and is the empty one, else
    <|endoftext|>. So does lm-evaluation-harness (TemplateLM._encode_pair).
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        spaces = context[len(stripped) :] if stripped else ""
        moved.append((stripped or context, spaces + continuation))
    # Our own tokenizers begin a token at the first space after a word, so what follows can be
    # encoded alone, and the context once for all its continuations.
    apart = [
        tokenizer.kind != "other" and context != "" and text.startswith(" ")
        for context, text in moved
    ]
    rests = [
        text if alone else context + text
        for (context, text), alone in zip(moved, apart, strict=True)
    ]
    texts = list(dict.fromkeys([*(context for context, _ in moved), *rests]))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    requests, prefix = [], list(tokenizer.prefix)
    for (context, _), rest, alone in zip(moved, rests, apart, strict=True):
        if not context:
            requests.append(_from_nothing(ids[rest], tokenizer.prompt("")))
        else:
            behind = ids[rest] if alone else ids[rest][len(ids[context]) :]
            requests.append(Request(prefix + ids[context], behind))
    return requests


def _from_nothing(text: list[int], begin: list[int]) -> Request:
    """A text that begins with the end of another needs no other before it."""
    return Request(text[:1], text[1:]) if text[:1] == begin else Request(begin, text)


def _over(nats: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """An empty choice is never taken."""
    return [n / length if length else -math.inf for n, length in zip(nats, lengths, strict=True)]


def _right(values: Sequence[float], answer: int) -> float:
    """The first of equals is taken; a model that gives NaN takes none."""
    return float(not np.isnan(values).any() and int(np.argmax(values)) == answer)

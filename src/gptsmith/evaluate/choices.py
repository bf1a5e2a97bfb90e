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
from gptsmith.evaluate.results import Result, mean
from gptsmith.model.gpt import GPTModel
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

    The model is left in the mode it was found in. progress: say on stderr how far this is. A
    question with a choice longer than the model's context is left out, with a note; ValueError if
    that goes for all of them.
    """
    pairs = [pair for question in questions for pair in question.choices]
    requests = encode_pairs(tokenizer, pairs)
    places = accumulate((len(question.choices) for question in questions), initial=0)
    spans = [slice(*span) for span in pairwise(places)]  # of each question's choices in the pairs
    asked = [
        (question, requests[span])
        for question, span in zip(questions, spans, strict=True)
        if max(len(r.continuation) for r in requests[span]) <= model.config.context_length
    ]
    notes = []
    if left_out := len(questions) - len(asked):
        notes = [
            f"{name}: {left_out:,} of {len(questions):,} questions are left out, they have choices "
            f"longer than the model's context of {model.config.context_length} tokens"
        ]
    if not asked:
        raise ValueError(notes[0] if notes else f"{name}: no questions")
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

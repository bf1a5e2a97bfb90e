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
from itertools import accumulate, pairwise
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

    The model is left in the mode it was found in. progress: say on stderr how far it is. ValueError names
    a question whose choice is longer than the model's context.
    """
    pairs = [pair for question in questions for pair in question.choices]
    requests = encode_pairs(tokenizer, pairs)
    places = accumulate((len(question.choices) for question in questions), initial=0)
    spans = [slice(*span) for span in pairwise(places)]  # of each question's choices in the pairs
    longest = model.config.context_length
    for question, span in zip(questions, spans, strict=True):
        if (size := max(len(request.continuation) for request in requests[span])) > longest:
            raise ValueError(
                f"{name}: a choice of question {question.id} has {size} tokens, the model's context"
                f" {longest}: it cannot be asked; take a model with a longer one"
            )
    found = log_likelihoods(model, requests, tokenizer.vocab_size, title=name if progress else None)
    items = [
        _item(name, question, requests[span], found[span])
        for question, span in zip(questions, spans, strict=True)
    ]
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for metric in ("acc", "acc_norm", "acc_token"):
        if items and metric in items[0]:
            metrics[metric], stderr[metric] = mean([item[metric] for item in items])
    if name == "lambada":
        loss, error = mean([-item["nats"][0] for item in items])
        metrics["perplexity"] = math.exp(min(loss, 700))
        stderr["perplexity"] = metrics["perplexity"] * error  # to first order
    return Result(name, len(items), metrics, stderr, items)


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

    An empty context is <|endoftext|>. So does lm-evaluation-harness (TemplateLM._encode_pair).
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        spaces = context[len(stripped) :] if stripped else ""
        moved.append((stripped or context, spaces + continuation))
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    wholes = tokenizer.encode_batch([context + text for context, text in moved])
    return [
        _cut(context, whole, tokenizer) for context, whole in zip(contexts, wholes, strict=True)
    ]


def _cut(context: list[int], whole: list[int], tokenizer: Tokenizer) -> Request:
    if context:
        return Request(context, whole[len(context) :])
    if whole[:1] == [tokenizer.eos_id]:
        return Request(whole[:1], whole[1:])
    return Request([tokenizer.eos_id], whole)


def _over(nats: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """An empty choice is never taken."""
    return [n / length if length else -math.inf for n, length in zip(nats, lengths, strict=True)]


def _right(values: Sequence[float], answer: int) -> float:
    """The first of equals is taken; a model that gives NaN takes none."""
    return float(not np.isnan(values).any() and int(np.argmax(values)) == answer)

"""From the logits of a step to the next tokens of its requests, with log-probabilities.

N rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import RequestState
from gptsmith.generate.sampling import penalize, token_logprob, uniform

Sampler = Callable[[Tensor, Sequence[int], Sequence[SamplingConfig], Sequence[float]], list[int]]
"""Tokens from some rows of logits (N, V), the settings of each and its number in [0, 1)."""


def extend(
    states: Sequence[RequestState],
    drafts: Sequence[Sequence[int]],
    logits: Tensor,
    rows: Sequence[int],
    given: Sequence[int],
    sample: Sampler,
) -> None:
    """Add to each request its next token and, as long as these are the tokens of its draft, those
    after it.

    logits (N, V): for request i, row rows[i] is what follows its newest token, and the next rows
    what follows each token of its draft; they may be changed. given: the next token of each request
    where the device has sampled it, else -1; a request with one has no draft and no row.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    depth = 0
    accepted = [0] * len(states)
    active = list(range(len(states)))
    while active:
        chosen = {} if depth else {i: token for i, token in enumerate(given) if token >= 0}
        here = [i for i in active if i not in chosen]
        at = [rows[i] + depth for i in here]
        by_model = {}  # logits that are needed as they are
        for i, row in zip(here, at, strict=True):
            state = states[i]
            if state.request.logprobs is not None:
                by_model[i] = logits[row].clone() if state.changes_logits else logits[row]
            if state.changes_logits:
                _change(logits[row], state)
        if here:
            settings = [states[i].request.sampling for i in here]
            uniforms = [
                uniform(s.seed, states[i].position) for i, s in zip(here, settings, strict=True)
            ]
            chosen |= zip(here, sample(logits, at, settings, uniforms), strict=True)
        agreed = []
        for i in active:
            state, token = states[i], chosen[i]
            if state.finished:  # the on_text of another cancelled it
                continue
            if state.remaining == 0:  # only its prompt was to be read
                state.generation.finish_reason = "length"
                continue
            logprob = None
            if i in by_model:
                logprob = token_logprob(by_model[i], token, state.request.logprobs or 0)
            state.push(token, logprob)
            if depth < len(drafts[i]) and drafts[i][depth] == token and not state.finished:
                agreed.append(i)
                accepted[i] += 1
        active, depth = agreed, depth + 1
    for state, draft, count in zip(states, drafts, accepted, strict=True):
        if draft:
            state.draft_length.record(len(draft), count)


def _change(logits: Tensor, state: RequestState) -> None:
    """Apply the penalties, the bias and the constraint of a request to logits (V,), in place."""
    penalize(logits, state.request.sampling, state.counts, state.request.logit_bias)
    if state.matcher is not None:
        state.matcher.mask(logits, state.stop_ids)


def score_prompt(state: RequestState, start: int, logits: Tensor) -> None:
    """Record the log-probabilities of the prompt's tokens at start, start + 1 ... from the logits
    (T, V) before them. Those that are known already stay."""
    prompt, found = state.request.prompt, state.generation.prompt_logprobs
    for position, before in enumerate(logits, start):
        if position == len(found) < len(prompt):
            found.append(
                token_logprob(before, prompt[position], state.request.prompt_logprobs or 0)
            )

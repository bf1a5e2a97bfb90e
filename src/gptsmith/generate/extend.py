"""From the logits of a step to the next tokens of its requests, with log-probabilities.

B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import RequestState
from gptsmith.generate.sampling import penalize, token_logprob, uniform

Sampler = Callable[[Sequence[Tensor], Sequence[SamplingConfig], Sequence[float]], list[int]]
"""Tokens from logits (V,) of each row, its settings and its number in [0, 1)."""


def extend(
    states: Sequence[RequestState],
    drafts: Sequence[Sequence[int]],
    logits: Sequence[Tensor | int],
    sample: Sampler,
) -> None:
    """Add to each request its next token and, as long as these are the tokens of its draft, those
    after it. logits[i] (1 + len(drafts[i]), V): after the newest token, and after each drafted one;
    or the next token itself, which the device has sampled.
    """
    depth = 0
    accepted = [0] * len(states)
    active = list(range(len(states)))
    while active:
        here = {i: x[depth] for i in active if isinstance(x := logits[i], Tensor)}
        chosen: dict[int, int] = {}
        if here:
            rows = [_penalized(states[i], x) for i, x in here.items()]
            settings = [states[i].request.sampling for i in here]
            uniforms = [uniform(states[i].request.sampling.seed, states[i].position) for i in here]
            chosen = dict(zip(here, sample(rows, settings, uniforms), strict=True))
        agreed = []
        for i in active:
            state, wanted = states[i], states[i].request.logprobs
            token = given if isinstance(given := logits[i], int) else chosen[i]
            if state.finished:  # the on_text of another cancelled it
                continue
            if state.remaining == 0:  # only its prompt was to be read
                state.generation.finish_reason = "length"
                continue
            state.push(token, None if wanted is None else token_logprob(here[i], token, wanted))
            if not state.finished and depth < len(drafts[i]) and drafts[i][depth] == token:
                agreed.append(i)
                accepted[i] += 1
        active, depth = agreed, depth + 1
    for state, draft, count in zip(states, drafts, accepted, strict=True):
        state.draft_length.record(len(draft), count)


def _penalized(state: RequestState, logits: Tensor) -> Tensor:
    """Logits (V,) with the penalties, the bias and the constraint of a request, in float32 or
    wider. They are changed in place if their log-probabilities are not needed."""
    s, bias, matcher = state.request.sampling, state.request.logit_bias, state.matcher
    penalized = bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    if not penalized and matcher is None:
        return logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(dtype, copy=state.request.logprobs is not None)
    if penalized:
        penalize(x, s, state.counts, bias)
    if matcher is not None:
        matcher.mask(x, state.stop_ids)
    return x


def score_prompt(state: RequestState, start: int, logits: Tensor) -> None:
    """Record the log-probabilities of the prompt's tokens at start, start + 1 ... from the logits
    (T, V) before them. Those that are known already stay."""
    prompt, found = state.request.prompt, state.generation.prompt_logprobs
    for position, before in enumerate(logits, start):
        if position == len(found) < len(prompt):
            found.append(
                token_logprob(before, prompt[position], state.request.prompt_logprobs or 0)
            )

"""From the logits of a step to the next tokens of its requests, with log-probabilities.

B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptsmith.generate.request import RequestState
from gptsmith.generate.sampling import penalize, sample, token_logprob, uniform, wide


def extend(
    states: Sequence[RequestState],
    drafts: Sequence[Sequence[int]],
    logits: Sequence[Tensor | int],
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
        tokens = _choose([states[i] for i in here], torch.stack([*here.values()])) if here else []
        chosen = dict(zip(here, tokens, strict=True))
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


def _choose(states: Sequence[RequestState], logits: Tensor) -> list[int]:
    """The next token of each request, from logits (B, V)."""
    x = wide(logits)
    settings = [state.request.sampling for state in states]
    for i, (state, s) in enumerate(zip(states, settings, strict=True)):
        bias, others = state.request.logit_bias, (s.presence_penalty, s.frequency_penalty)
        penalized = bias or s.repetition_penalty != 1 or any(others)
        if penalized or state.matcher is not None:
            x = x.clone() if x is logits else x
        if penalized:
            penalize(x[i], s, state.counts, bias)
        if state.matcher is not None:
            state.matcher.mask(x[i], state.stop_ids)
    return sample(
        x, settings, [uniform(state.request.sampling.seed, state.position) for state in states]
    )


def score_prompt(state: RequestState, start: int, logits: Tensor) -> None:
    """Record the log-probabilities of the prompt's tokens at start, start + 1 ... from the logits
    (T, V) before them. Those that are known already stay."""
    prompt, found = state.request.prompt, state.generation.prompt_logprobs
    for position, before in enumerate(logits, start):
        if position == len(found) < len(prompt):
            found.append(
                token_logprob(before, prompt[position], state.request.prompt_logprobs or 0)
            )

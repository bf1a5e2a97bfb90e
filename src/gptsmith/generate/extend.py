"""From the logits of a step to the next tokens of its requests, with log-probabilities.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptsmith.generate.request import Row
from gptsmith.generate.sampling import penalize, sample, token_logprob, uniform, wide


def extend(rows: Sequence[Row], drafts: Sequence[Sequence[int]], logits: Sequence[Tensor]) -> None:
    """Add to each row its next token and, as long as these are the tokens of its draft, those after
    it. logits[i] (1 + len(drafts[i]), V): after the newest token, and after each of the draft.
    """
    depth = 0
    accepted = [0] * len(rows)
    active = list(range(len(rows)))
    while active:
        here = torch.stack([logits[i][depth] for i in active])
        tokens = _choose([rows[i] for i in active], here)
        agreed = []
        for i, token, row_logits in zip(active, tokens, here, strict=True):
            row, wanted = rows[i], rows[i].request.logprobs
            if row.finished:  # the on_text of another cancelled it
                continue
            if row.remaining == 0:  # only its prompt was to be read
                row.generation.finish_reason = "length"
                continue
            row.push(token, None if wanted is None else token_logprob(row_logits, token, wanted))
            if not row.finished and depth < len(drafts[i]) and drafts[i][depth] == token:
                agreed.append(i)
                accepted[i] += 1
        active, depth = agreed, depth + 1
    for row, draft, count in zip(rows, drafts, accepted, strict=True):
        row.draft_length.record(len(draft), count)


def _choose(rows: Sequence[Row], logits: Tensor) -> list[int]:
    """The next token of each row, from logits (rows, V)."""
    x = wide(logits)
    settings = [row.request.sampling for row in rows]
    for i, (row, s) in enumerate(zip(rows, settings, strict=True)):
        bias, others = row.request.logit_bias, (s.presence_penalty, s.frequency_penalty)
        penalized = bias or s.repetition_penalty != 1 or any(others)
        if penalized or row.matcher is not None:
            x = x.clone() if x is logits else x
        if penalized:
            penalize(x[i], s, row.counts, bias)
        if row.matcher is not None:
            row.matcher.mask(x[i], row.stop_ids)
    return sample(x, settings, [uniform(row.request.sampling.seed, row.position) for row in rows])


def score_prompt(row: Row, start: int, logits: Tensor) -> None:
    """Record the log-probabilities of the prompt's tokens at start, start + 1 ... from the logits
    (T, V) before them. Those that are known already stay."""
    prompt, found = row.request.prompt, row.generation.prompt_logprobs
    for position, before in enumerate(logits, start):
        if position == len(found) < len(prompt):
            found.append(token_logprob(before, prompt[position], row.request.prompt_logprobs or 0))

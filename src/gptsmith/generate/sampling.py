"""From the logits of the next token to a token: temperature, top-k, top-p, min-p, penalty, greedy.

B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from gptsmith.config import Section

_CANDIDATES = 1024  # enough for most nuclei, and six times as fast as sorting 50,257 logits


class SamplingConfig(Section):
    """How text is drawn from a model."""

    max_new_tokens: int = Field(200, ge=1)
    """Stop after this many tokens."""
    temperature: float = Field(0.8, ge=0)
    """Divides the logits: below 1 sharper, above 1 wilder, 0 always takes the likeliest token."""
    top_k: int | None = Field(None, ge=1)
    """Draw from the k likeliest tokens only."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Draw from tokens that are at least this fraction as likely as the likeliest."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that are already in the text become less likely."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the first row; the next row has the next seed. Equal seeds give equal texts."""


def sample(
    logits: Tensor,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
) -> Tensor:
    """One token for each row of logits (B, V): ids (B,).

    A row's token depends on its own logits and its own generator (on the CPU, one number per call)
    alone, and continuously so: it is found by its place in the cumulative distribution in the
    order of the vocabulary, not of the sorted probabilities, where rounding could swap neighbours.
    seen: bool (B, V), the tokens that repetition_penalty is for.
    Raises ValueError for logits from which nothing can be drawn.
    Sources: top-k Fan et al. 2018, top-p Holtzman et al. 2020, min-p Nguyen et al. 2024, repetition
    penalty Keskar et al. 2019; they apply in the order of transformers.
    """
    # float64, which MPS does not have
    x = logits.to("cpu" if logits.device.type == "mps" else logits.device).double()
    if config.repetition_penalty != 1 and seen is not None:
        penalty = config.repetition_penalty
        x = torch.where(seen.to(x.device), torch.where(x > 0, x / penalty, x * penalty), x)
    top = x.amax(dim=-1, keepdim=True)  # (B, 1), NaN if there is one
    if not top.isfinite().all():
        raise ValueError(
            f"the model's logits reach {top[~top.isfinite()][0].item()}: its weights are damaged"
            " or its precision overflows; check them, or take bf16 or fp32"
        )
    if config.temperature == 0:
        return x.argmax(dim=-1).to(logits.device)
    x = (x - top) / config.temperature  # (B, V), the largest is 0
    weights = x.exp()
    if config.top_k is not None or config.top_p is not None:
        weights = weights * _best(x, config.top_k, config.top_p)
    if config.min_p:
        weights = weights * (x >= math.log(config.min_p))
    cumulative = weights.cumsum(dim=-1)  # (B, V)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.double) for g in generators])
    point = uniform.to(x.device) * cumulative[:, -1:]  # (B, 1), below the total
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).to(logits.device)


def _best(x: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Which of x (B, V) are the best k, and of these the nucleus; ties go to the smaller ids."""
    V = x.shape[-1]
    best = x.topk(min(top_k or _CANDIDATES, V)).values  # (B, k), the largest first
    if top_p is None:
        count = torch.full_like(x[:, :1], best.shape[-1], dtype=torch.long)  # (B, 1)
    else:
        total = (x if top_k is None else best).logsumexp(dim=-1, keepdim=True)
        cumulative = (best - total).exp().cumsum(dim=-1)  # (B, k)
        if top_k is None and bool((cumulative[:, -1] < top_p).any()):
            best = x.sort(dim=-1, descending=True).values
            cumulative = (best - total).exp().cumsum(dim=-1)
        count = 1 + (cumulative[:, :-1] < top_p).sum(dim=-1, keepdim=True)
    last = best.gather(-1, count - 1)
    above, equal = x > last, x == last
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= room))

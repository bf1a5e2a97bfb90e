"""From next-token logits to tokens: penalties, temperature, top-k, top-p, min-p, greedy; log-probs.

Everything here is a function of its arguments: the random number of a token depends only on the
request's seed and its position, so a token that is computed again, or as a draft, is the same.

B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from gptsmith.generate.options import SamplingConfig

_CANDIDATES = 1024  # enough for most nuclei, and six times as fast as sorting 50,257 logits


class TokenLogprob(NamedTuple):
    """A token's log-probability in nats by the model alone, before temperature, penalties and bias.

    top: the most likely tokens and their log-probabilities, the likeliest first; of equal ones the
    smaller ids come first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for the token at a position: a hash of seed and position."""
    digest = blake2b(b"%d,%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def wide(logits: Tensor) -> Tensor:
    """Logits in float64, on the CPU where the device (MPS) does not have it."""
    return logits.to("cpu" if logits.device.type == "mps" else logits.device).double()


def penalize(
    x: Tensor, settings: SamplingConfig, counts: Mapping[int, int], bias: Mapping[int, float]
) -> None:
    """Add the bias to the logits x (V,) and apply the penalties, in place.

    counts: how often each token has been generated; 0 for those that occur in the prompt only.
    Order and definitions are those of vLLM: the bias, then the repetition penalty (Keskar et al.
    2019) for tokens of prompt and completion, then frequency and presence penalty (OpenAI) for
    those of the completion.
    """
    if bias:
        x[list(bias)] += x.new_tensor(list(bias.values()))
    if settings.repetition_penalty != 1 and counts:
        ids = torch.tensor(list(counts), device=x.device)
        seen, penalty = x[ids], settings.repetition_penalty
        x[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if settings.frequency_penalty or settings.presence_penalty:
        new = {token: n for token, n in counts.items() if n}
        lower = settings.frequency_penalty * x.new_tensor(list(new.values()))
        x[list(new)] -= lower + settings.presence_penalty


def sample(x: Tensor, settings: Sequence[SamplingConfig], uniforms: Sequence[float]) -> list[int]:
    """One token for each row of penalized float64 logits x (B, V).

    A row's token depends only on its own logits, settings and number in [0, 1), and continuously
    so: it is found by its place in the cumulative distribution in the order of the vocabulary, not
    in the order of the probabilities, where rounding could swap neighbours. Each row is computed
    by itself, because torch may sum a batch in another order. ValueError for logits that are not
    finite numbers.
    Sources: top-k Fan et al. 2018, top-p Holtzman et al. 2020, min-p Nguyen et al. 2024; they are
    applied in the order of transformers.
    """
    best, greedy = x.max(dim=-1)  # NaN if there is one
    if not best.isfinite().all():
        reject_logits(best[~best.isfinite()][0])
    tokens = greedy.tolist()
    for row, (s, point) in enumerate(zip(settings, uniforms, strict=True)):
        if s.temperature:
            tokens[row] = _sample((x[row] - best[row]) / s.temperature, s, point)
    return tokens


def reject_logits(largest: Tensor) -> NoReturn:
    raise ValueError(
        f"the model's logits reach {largest.item()}: its weights are damaged or its precision"
        " overflows; check them, or use bf16 or fp32"
    )


def _sample(x: Tensor, settings: SamplingConfig, uniform: float) -> int:
    """From log-probabilities x (V,) up to a constant, the largest 0."""
    weights = x.exp()
    if settings.top_k is not None or settings.top_p is not None:
        weights = weights * _most_likely(x, settings.top_k, settings.top_p)
    if settings.min_p:
        weights = weights * (x >= math.log(settings.min_p))
    cumulative = weights.cumsum(dim=0)  # (V,)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))


def _most_likely(x: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Which entries of x (V,) are in the top k and, within those, in the nucleus of top_p: bools
    (V,). Of equal entries the smaller ids come first."""
    best = x.topk(min(top_k or _CANDIDATES, len(x))).values  # the largest first
    count = len(best)
    if top_p is not None:
        total = (x if top_k is None else best).logsumexp(dim=0)
        cumulative = (best - total).exp().cumsum(dim=0)
        if top_k is None and cumulative[-1] < top_p:
            best = x.sort(descending=True).values
            cumulative = (best - total).exp().cumsum(dim=0)
        count = 1 + int((cumulative[:-1] < top_p).sum())
    above, equal = x > best[count - 1], x == best[count - 1]
    return above | (equal & (equal.cumsum(dim=0) <= count - above.sum()))


def token_logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The log-probability of a token under logits (V,), and the most likely alternatives.

    One row at a time: torch may sum a batch of rows in another order.
    """
    logprobs = wide(logits).log_softmax(dim=-1).float()
    top: list[tuple[int, float]] = []
    if alternatives:
        # topk alone does not say which of equal values it takes
        last = logprobs.topk(min(alternatives, len(logprobs))).values[-1]
        ids = (logprobs >= last).nonzero().squeeze(1)
        order = logprobs[ids].argsort(descending=True, stable=True)[:alternatives]
        top = [(int(i), float(logprobs[i])) for i in ids[order]]
    return TokenLogprob(token, float(logprobs[token]), tuple(top))


class RowSettings(NamedTuple):
    """The sampling of every row, in tensors (B, 1) on the device of the logits."""

    temperature: Tensor  # float64
    uniform: Tensor  # float64, in [0, 1)
    top_p: Tensor  # float64; above 1: off
    log_min_p: Tensor  # float64; -inf: off
    top_k: Tensor  # int64; 0: off


def sample_rows(x: Tensor, settings: RowSettings | None, ranked: bool) -> Tensor:
    """Like `sample` for logits x (B, V) of any type, without a value on the host: tokens (B,), or
    -1 for a row that `sample` must do, because its logits are not finite numbers or its nucleus is
    too large.

    settings: None if all rows are greedy. ranked: whether a row has top_k or top_p. The rows are
    summed as a batch, so a token may differ where two numbers agree to 15 digits.
    """
    best, greedy = x.max(dim=-1, keepdim=True)  # (B, 1)
    tokens = greedy.masked_fill(~best.isfinite(), -1)
    if settings is not None:
        sampled = settings.temperature > 0
        x = (x.double() - best.double()) / settings.temperature.masked_fill(~sampled, 1.0)
        weights = x.exp() * (x >= settings.log_min_p)
        if ranked:
            allowed, known = _most_likely_rows(x, settings.top_k, settings.top_p)
            weights = weights * allowed
            tokens = tokens.masked_fill(sampled & ~known, -1)
        cumulative = weights.cumsum(dim=-1)
        found = torch.searchsorted(cumulative, settings.uniform * cumulative[:, -1:], right=True)
        tokens = found.where(sampled & (tokens >= 0), tokens)
    return tokens.squeeze(1)


def _most_likely_rows(x: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """As _most_likely: bools (B, V), and whether a row's are known from the largest candidates."""
    V = x.shape[1]
    best = x.topk(min(_CANDIDATES, V)).values  # (B, N), the largest first
    N = best.shape[1]
    limited = top_k > 0
    limit = top_k.clamp(max=V).masked_fill(~limited, N)
    inside = torch.arange(N, device=x.device) < limit  # (B, N)
    of_best = best.masked_fill(~inside, -math.inf).logsumexp(dim=-1, keepdim=True)
    total = of_best.where(limited, x.logsumexp(dim=-1, keepdim=True))
    cumulative = (best - total).exp().cumsum(dim=-1)
    before = (cumulative < top_p) & (torch.arange(1, N + 1, device=x.device) < limit)
    count = (1 + before.sum(dim=-1, keepdim=True)).clamp(max=N)  # (B, 1)
    threshold = best.gather(1, count - 1)
    above, equal = x > threshold, x == threshold
    allowed = above | (equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
    unlimited = ~limited & (top_p > 1)
    known = torch.where(limited, limit <= N, (cumulative[:, -1:] >= top_p) | (N == V))
    return allowed | unlimited, known | unlimited

"""Text from a model: many prompts at once, each row as if it were alone.

B rows, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.generate.sampling import SamplingConfig, sample
from gptsmith.model.kv_cache import KVCache

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer

OnToken = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """What became of one prompt."""

    ids: list[int]
    """The new tokens, without a stop id, but with those that a stop string was made of."""
    text: str
    """The new text, cut before the stop string; empty if there was no tokenizer."""
    finish: Literal["stop", "length"]
    """Ended by a stop id or stop string, or by max_new_tokens."""
    forgotten: int
    """Oldest tokens that were dropped because the text outgrew the model's context."""
    notice: str | None
    """Why this row could not use the KV cache, for people; None if it could."""


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    tokenizer: Tokenizer | None = None,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue every prompt until a stop id, a stop string or max_new_tokens.

    A row depends on its prompt and its seed alone (default: config.seed, config.seed + 1, ...): it
    gets the same tokens in any batch, up to rounding. A row that reaches the model's context length
    keeps its newest half and is read again. stop, on_token(row, piece of text) and text need a
    tokenizer; pieces never end within a character or within what may become a stop string. No id
    beyond the tokenizer's vocabulary is drawn from a model that is padded to a larger one.

    Raises ValueError for an empty prompt, an id outside the vocabulary, an empty stop string.
    """
    V = model.config.vocab_size
    if tokenizer is not None:
        V = min(V, tokenizer.vocab_size)
    elif stop or on_token:
        raise ValueError("stop strings and on_token need a tokenizer: give tokenizer=")
    if "" in stop:
        raise ValueError("stop holds an empty string, which is in every text: leave it out")
    if seeds is None:
        seeds = range(config.seed, config.seed + len(prompts))
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: start a text with <|endoftext|>")
        if not (min(prompt) >= 0 and max(prompt) < V):
            bad = next(t for t in prompt if not 0 <= t < V)
            raise ValueError(
                f"prompt {i} holds the id {bad}, outside the vocabulary 0..{V - 1}:"
                " encode it with the model's own tokenizer"
            )
    if model.mask.facts.uses_b:
        raise ValueError(
            f"the mask {model.mask.expression} depends on the row of the batch: generated rows"
            " must not depend on their neighbours; take a mask without b"
        )
    rows = [
        _Row(i, prompt, seed, tokenizer, stop, on_token)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    training = model.training
    model.eval()
    try:
        # The weights' own dtype decides, whatever autocast the caller is in.
        with torch.inference_mode(), torch.autocast(model.head_weight.device.type, enabled=False):
            _decode(model, rows, config, V, frozenset(stop_ids))
    finally:
        model.train(training)
    return [row.result() for row in rows]


def generate_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[str]:
    """The continuation of every prompt as text, to its end (<|endoftext|>) or max_new_tokens.

    An empty prompt starts a new text. The arguments and errors are those of `generate`.
    """
    eos = tokenizer.eos_id
    results = generate(
        model,
        [tokenizer.prompt(prompt) for prompt in prompts],
        config,
        tokenizer=tokenizer,
        stop_ids=[eos],
        stop=stop,
        seeds=seeds,
        on_token=on_token,
    )
    return [result.text for result in results]


class _Text:
    """Text as it comes, held back while its end may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.stopped = False
        self.held = ""

    def push(self, piece: str, last: bool = False) -> str:
        """What may be shown after this piece. The stop string that is complete first ends it."""
        if self.stopped:
            return ""
        text = self.held + piece
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        longest = 0 if last else min(len(text), max(map(len, self.stop), default=1) - 1)
        keep = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Row:
    """One text in the making."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        seed: int,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        on_token: OnToken | None,
    ) -> None:
        self.index = index
        self.context = list(prompt)  # what the model reads
        self.ids: list[int] = []
        self.forgotten = 0
        self.cached = False
        self.notice: str | None = None
        self.finish: Literal["stop", "length"] | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._text = _Text(stop)
        self._shown: list[str] = []
        self._on_token = on_token

    def outgrows(self, limit: int) -> bool:
        """Whether the context was longer than the model's; its newest half is then kept."""
        if len(self.context) <= limit:
            return False
        dropped = len(self.context) - max(1, limit // 2)
        del self.context[:dropped]
        self.forgotten += dropped
        self.cached = False
        return True

    def push(self, token: int, stop_ids: frozenset[int], most: int) -> None:
        """Take a token; sets `finish` when it is the last."""
        if token in stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            self.context.append(token)
            if self._stream is not None:
                self._show(self._text.push(self._stream.push(token)))
            if self._text.stopped:
                self.finish = "stop"
            elif len(self.ids) >= most:
                self.finish = "length"
        if self.finish is not None and self._stream is not None:
            self._show(self._text.push(self._stream.flush(), last=True))

    def _show(self, piece: str) -> None:
        if piece:
            self._shown.append(piece)
            if self._on_token is not None:
                self._on_token(self.index, piece)

    def result(self) -> Generation:
        assert self.finish is not None
        return Generation(self.ids, "".join(self._shown), self.finish, self.forgotten, self.notice)


def _decode(
    model: GPTModel, rows: Sequence[_Row], config: SamplingConfig, V: int, stop_ids: frozenset[int]
) -> None:
    limit, device = model.config.context_length, model.head_weight.device
    seen = None  # (B, V)
    if config.repetition_penalty != 1:
        seen = torch.zeros(len(rows), V, dtype=torch.bool, device=device)
        for row in rows:
            seen[row.index, row.context] = True
    for row in rows:
        row.outgrows(limit)
    longest = max((len(row.context) for row in rows), default=0) + config.max_new_tokens
    cache = _new_cache(model, len(rows), longest)
    active = list(rows)  # row active[i] has place i in the cache
    while active:
        for i, row in enumerate(active):
            if row.outgrows(limit):
                cache.reset(i)
        x = _last_vectors(model, active, cache)  # (B, C)
        logits = F.linear(x, model.head_weight)[:, :V]
        at = [row.index for row in active]
        tokens = sample(
            logits, config, [row.generator for row in active], None if seen is None else seen[at]
        )
        if seen is not None:
            seen[at, tokens] = True
        for row, token in zip(active, tokens.tolist(), strict=True):
            row.push(token, stop_ids, config.max_new_tokens)
        for i in reversed(range(len(active))):
            if active[i].finish is not None:
                cache.drop(i)
                active[i] = active[-1]
                active.pop()


def _last_vectors(model: GPTModel, active: Sequence[_Row], cache: KVCache) -> Tensor:
    """The vector (B, C) behind the newest token of every row, read in the cheapest exact way."""
    limit, device = model.config.context_length, model.head_weight.device
    ahead = model.mask.lookahead(limit, model.config.n_head)
    steps = [i for i, row in enumerate(active) if row.cached]
    reads = [i for i, row in enumerate(active) if not row.cached and len(row.context) >= ahead]
    whole = [i for i, row in enumerate(active) if len(row.context) < ahead]
    if len(reads) == len(active):  # the first pass
        x = _read(model, active, cache)
    elif steps:
        ids = torch.tensor([row.context[-1:] for row in active], device=device)  # (B, 1)
        positions = cache.next_positions(1)
        idle = reads + whole
        if idle:
            positions[idle] = -1
        x = model.hidden(ids, positions=positions, cache=cache)[:, 0]
    else:
        x = model.head_weight.new_empty(len(active), model.config.n_embd)
    if reads and len(reads) < len(active):
        own = _new_cache(model, len(reads), cache.capacity)
        x[reads] = _read(model, [active[i] for i in reads], own)
        cache.put(reads, own)
    if whole:
        x[whole] = _read(model, [active[i] for i in whole], None)
    for i in reads:
        active[i].cached = True
    for i in whole:
        active[i].notice = (
            f"under the mask {model.mask.expression} tokens see later ones, up to position"
            f" {ahead - 1}: no KV cache before that, each new token reads the whole text again"
        )
    return x


def _read(model: GPTModel, rows: Sequence[_Row], cache: KVCache | None) -> Tensor:
    """The last vectors (B, C) of whole contexts, read in one pass, padded on the right."""
    device = model.head_weight.device
    lengths = torch.tensor([len(row.context) for row in rows], device=device)  # (B,)
    T = int(lengths.max())
    ids = torch.tensor([row.context + [0] * (T - len(row.context)) for row in rows], device=device)
    at = torch.arange(T, device=device)
    padding = at >= lengths[:, None]  # (B, T)
    if cache is not None:
        x = model.hidden(ids, positions=at.where(~padding, -1), cache=cache)  # (B, T, C)
    else:  # padding is a document of its own, which the text cannot see
        x = model.hidden(ids, documents=padding.long() if len(rows) > 1 else None)
    return x[torch.arange(len(rows), device=device), lengths - 1]


def _new_cache(model: GPTModel, batch: int, longest: int) -> KVCache:
    weight = model.head_weight
    return KVCache.for_model(model.config, model.mask, batch, longest, weight.dtype, weight.device)

"""The engine: requests for text in, tokens out, many requests at once with one KV cache.

A request joins and leaves between steps, and every step adds one token to each running request.

B rows, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.generate.options import DEFAULT_SAMPLING, SamplingConfig
from gptsmith.generate.prefix_cache import PrefixCache
from gptsmith.generate.request import Generation, Request, Row
from gptsmith.generate.sampling import sample

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer

MAX_BATCH_SIZE = 32  # requests that run at the same time


class Engine:
    """Generates text for any number of requests with one model.

        engine = Engine(model, tokenizer)
        [generation] = engine.generate("Once upon a time", SamplingConfig(temperature=0))

    or, one token at a time, while other requests come and go:

        generation = engine.add(Request(tokenizer.prompt("Once"), on_text=print))
        while engine.busy:
            engine.step()

    The text of a request depends on its prompt, settings and seed alone; other requests change it
    by rounding at most. Ids beyond the tokenizer's vocabulary, which a padded model has, are never
    sampled. Keep the engine for prompts that share a prefix, such as the turns of a chat: the
    longest prefix that the cache holds is not read again.
    tokenizer: needed for prompts that are text, stop strings, and the text and end of the results.
    ValueError for a mask that depends on the row of the batch.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
    ) -> None:
        if model.mask.facts.uses_b:
            raise ValueError(
                f"the mask {model.mask.expression} depends on the row of the batch: generated texts"
                " must not depend on their neighbours; use a mask without b"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self._limit = model.config.context_length
        sizes = [model.config.vocab_size] + ([] if tokenizer is None else [tokenizer.vocab_size])
        self._V = min(sizes)
        # A text shorter than this cannot be cached, as later tokens change what earlier ones see.
        self._lookahead = model.mask.lookahead(self._limit, model.config.n_head)
        self._waiting: deque[Row] = deque()  # to be read before their next token
        self._uncached: list[Row] = []  # shorter than the lookahead, read again in every step
        self._running: list[Row] = []  # row i is row i of the cache
        self._cache = PrefixCache(model, self._lookahead)

    def __repr__(self) -> str:
        unfinished = len(self._waiting) + len(self._uncached) + len(self._running)
        model = f"{self.model.config.n_layer} layers, context {self._limit:,}, on {self._device}"
        return f"Engine({model}, {unfinished} unfinished requests)"

    # Requests

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._waiting or self._uncached or self._running)

    def add(self, request: Request) -> Generation:
        """Queue a request; `step` extends the generation that this returns.

        ValueError for an empty prompt, an id outside the vocabulary, an empty stop string, stop
        strings or on_text without a tokenizer, and a prompt longer than the context with
        context_shift off.
        """
        self._check(request)
        stop_ids = request.stop_ids
        if stop_ids is None:
            stop_ids = () if self.tokenizer is None else self.tokenizer.special_ids.ends
        stream = None if self.tokenizer is None else self.tokenizer.stream(request.prompt)
        row = Row(request, frozenset(stop_ids), self._limit, stream)
        if request.sampling.repetition_penalty != 1:
            row.seen = torch.zeros(self._V, dtype=torch.bool, device=self._device)
            row.seen[row.context] = True
        if row.remaining:
            self._waiting.append(row)
        else:
            row.generation.finish_reason = "length"
        return row.generation

    def cancel(self, generation: Generation) -> None:
        """Finish a request now, with the text that is certain so far."""
        for row in [*self._waiting, *self._uncached, *self._running]:
            if row.generation is generation and generation.finish_reason is None:
                generation.finish_reason = "cancelled"
                self._remove(row)

    def refresh(self) -> None:
        """Forget all cached keys and values: call it when the model's weights have changed.
        Unfinished requests continue with the new weights."""
        self._waiting.extendleft(reversed(self._running))
        self._running = []
        self._cache.clear()

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        context_shift: bool = True,
    ) -> list[Generation]:
        """Continue every prompt to its end: one text, or several texts or token ids.

        Prompt i has the seed sampling.seed + i. An empty text starts a new document. The other
        arguments are those of Request, the errors those of `add`.
        """
        encoded = [self._encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        generations: dict[int, Generation] = {}
        # Texts of similar length run together: little padding.
        for i in sorted(range(len(encoded)), key=lambda i: len(encoded[i])):
            request = Request(
                encoded[i],
                sampling.with_seed(sampling.seed + i),
                stop,
                stop_ids,
                context_shift=context_shift,
            )
            try:
                generations[i] = self.add(request)
            except ValueError as error:
                for generation in generations.values():
                    self.cancel(generation)
                raise ValueError(f"prompt {i}: {error}") from None
        for _ in self.as_completed(generations.values()):
            pass
        return [generations[i] for i in range(len(encoded))]

    def as_completed(self, generations: Iterable[Generation]) -> Iterator[Generation]:
        """Step until all of these have finished; yields each one when it does."""
        pending = {id(generation): generation for generation in generations}
        while pending:
            # Not by what `step` returns: it does not return requests that were cancelled.
            finished = [g for g in pending.values() if g.finish_reason is not None or not self.busy]
            for generation in finished:
                del pending[id(generation)]
                yield generation
            if pending and self.busy:
                self.step()

    # A step

    def step(self) -> list[Generation]:
        """Add one token to every running request; waiting ones join while there is room.

        Returns the generations that finished in this step. An exception (Ctrl-C, an error in
        on_text) cancels all requests.
        """
        training = self.model.training
        if training:
            self.model.eval()
        try:
            # Compute in the dtype of the weights, even under a caller's autocast.
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
                return self._step()
        except BaseException:
            for row in [*self._waiting, *self._uncached, *self._running]:
                row.generation.finish_reason = "cancelled"
            self._waiting.clear()
            self._uncached, self._running = [], []
            self.refresh()  # the pass may have stopped halfway
            raise
        finally:
            if training:
                self.model.train()

    def _step(self) -> list[Generation]:
        for row in [row for row in self._running if len(row.context) > self._limit]:
            self._remove(row, keep=False)
            self._waiting.appendleft(row)
        decoding = len(self._running)
        self._admit()
        rows = self._running + self._uncached
        if not rows:
            return []
        parts = []  # of (B, C)
        if decoding:
            parts.append(self._decode(decoding))
        if decoding < len(self._running):
            parts.append(self._prefill(decoding, len(self._running)))
        if self._uncached:
            parts.append(self._read_again())
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        logits = F.linear(x, self.model.head_weight)[:, : self._V]
        settings = [row.request.sampling for row in rows]
        tokens = sample(logits, settings, [row.generator for row in rows], self._seen(rows))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row.generation.finish_reason is None:  # else the on_text of another cancelled it
                row.push(token)
        running = self._running + self._uncached
        finished = [row for row in running if row.generation.finish_reason is not None]
        for row in reversed(finished):
            self._remove(row)
        return [row.generation for row in finished]

    def _admit(self) -> None:
        """Start waiting rows while the batch has room."""
        grown = [row for row in self._uncached if len(row.context) >= self._lookahead]
        room = self.max_batch_size - len(self._running) - len(self._uncached)
        taken = list(islice(self._waiting, max(0, room)))
        for row in taken:
            if len(row.context) > self._limit:
                row.shift()
        joining = grown + [row for row in taken if len(row.context) >= self._lookahead]
        if joining:
            longest = max(len(row.context) + row.remaining for row in joining)
            self._cache.reserve(len(self._running) + len(joining), longest)
        for row in joining:
            self._cache.join(row.context)
        # Only now: out of memory or interrupted, `step` cancels all requests that it finds.
        for _ in taken:
            self._waiting.popleft()
        self._uncached = [row for row in (*self._uncached, *taken) if row not in joining]
        self._running += joining

    def _remove(self, row: Row, keep: bool = True) -> None:
        """Take a row out. keep: the cache still holds its tokens for later prompts."""
        if row in self._running:
            i = self._running.index(row)
            self._cache.leave(i, keep)
            self._running[i] = self._running[-1]
            self._running.pop()
        elif row in self._uncached:
            self._uncached.remove(row)
        else:
            self._waiting.remove(row)

    # Forward passes; each returns the vectors (B, C) of the newest tokens

    def _decode(self, count: int) -> Tensor:
        """Read one token of each of the first `count` running rows."""
        ids = torch.tensor([row.context[-1:] for row in self._running[:count]], device=self._device)
        self._cache.kv.use_rows(0, count)
        return self.model.hidden(ids, cache=self._cache.kv)[:, 0]

    def _prefill(self, start: int, stop: int) -> Tensor:
        """Read, in one pass, the tokens of running rows start..stop - 1 that the cache lacks."""
        cache = self._cache.kv
        held = cache.lengths[start:stop]
        rows = self._running[start:stop]
        ids, padding = self._pad([row.context[n:] for row, n in zip(rows, held, strict=True)])
        cache.use_rows(start, stop)
        positions = cache.next_positions(ids.shape[1]).masked_fill(padding, -1)
        return self._newest(self.model.hidden(ids, positions=positions, cache=cache), padding)

    def _read_again(self) -> Tensor:
        """Read the whole texts for which the cache cannot be used."""
        ids, padding = self._pad([row.context for row in self._uncached])
        # Padding is a document of its own, which the texts cannot see.
        documents = padding.long() if len(self._uncached) > 1 else None
        mask = self.model.mask.expression
        for row in self._uncached:
            row.generation.notice = (
                f"under the mask {mask} tokens see later ones, up to position"
                f" {self._lookahead - 1}: until the text is that long, the KV cache cannot be used"
                " and each new token requires reading the whole text again"
            )
        return self._newest(self.model.hidden(ids, documents=documents), padding)

    def _pad(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, T), padded on the right, and where the padding is: bools (B, T)."""
        T = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (T - len(text))] for text in texts], device=self._device)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        return ids, torch.arange(T, device=self._device) >= lengths[:, None]

    def _newest(self, x: Tensor, padding: Tensor) -> Tensor:
        """Of vectors (B, T, C), those (B, C) of the last tokens before the padding."""
        last = (~padding).sum(dim=1) - 1
        return x[torch.arange(len(x), device=x.device), last]

    def _seen(self, rows: Sequence[Row]) -> Tensor | None:
        """The tokens of every text, bools (B, V), if a repetition penalty needs them."""
        if all(row.seen is None for row in rows):
            return None
        unused = torch.zeros(self._V, dtype=torch.bool, device=self._device)
        return torch.stack([unused if row.seen is None else row.seen for row in rows])

    # Checks

    @property
    def _device(self) -> torch.device:
        return self.model.head_weight.device

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if hasattr(prompt, "tolist"):  # a tensor or an array of ids
            prompt = prompt.tolist()
        if isinstance(prompt, int):
            raise ValueError(
                f"prompt {prompt} is a token id: several prompts of ids are [[...], ...]"
            )
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise ValueError("a prompt that is text needs a tokenizer: Engine(model, tokenizer)")
        return self.tokenizer.prompt(prompt)

    def _check(self, request: Request) -> None:
        prompt = request.prompt
        if self.tokenizer is None and (request.stop or request.on_text):
            raise ValueError("stop strings and on_text need a tokenizer: Engine(model, tokenizer)")
        if "" in request.stop:
            raise ValueError("stop contains an empty string, which every text contains: omit it")
        if len(prompt) == 0:
            raise ValueError("an empty prompt: start a text with <|endoftext|>")
        if not (min(prompt) >= 0 and max(prompt) < self._V):
            bad = next(t for t in prompt if not 0 <= t < self._V)
            raise ValueError(
                f"id {bad} is outside the vocabulary 0..{self._V - 1}:"
                " encode the prompt with the model's own tokenizer"
            )
        if not request.context_shift and len(prompt) > self._limit:
            raise ValueError(
                f"{len(prompt)} tokens do not fit into the model's context of {self._limit}:"
                " shorten the prompt"
            )

"""The engine: generates for many requests at once, with one KV cache (continuous batching).

Requests join and leave between steps; each step adds one token to every request whose prompt has
been read.

C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptsmith.arguments import check_several, token_ids
from gptsmith.generate.constraint import Constraint, ConstraintCompiler, Matcher
from gptsmith.generate.draft_model import DraftModel
from gptsmith.generate.extend import extend, score_prompt
from gptsmith.generate.forward import make_forward, next_logits
from gptsmith.generate.options import DEFAULT_SAMPLING, SamplingConfig
from gptsmith.generate.pages import Pages
from gptsmith.generate.request import Generation, Request, RequestState
from gptsmith.generate.scheduler import Scheduler, Span, Stats

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer

MAX_BATCH_SIZE = 32  # requests that run at the same time
# While prompts are read, decoding requests wait: a step should be short, and as cheap per token as
# a long one, which on a CPU begins with about 32 tokens (docs/log.md).
CHUNK = {"cpu": 32, "cuda": 2048}  # prompts are read up to multiples of it
BUDGET = {"cpu": 128, "cuda": 8192}  # tokens of prompts that are read in a step
BUDGET_PER_REQUEST = {"cpu": 8, "cuda": None}  # while any request decodes, see Scheduler
DRAFT_TOKENS = 4  # of a draft model, in one step
SCORED = 64  # tokens of a prompt whose logits are in memory at once


class Engine:
    """Generates text for any number of requests.

        engine = Engine(model, tokenizer)
        [generation] = engine.generate("Once upon a time", SamplingConfig(temperature=0))

    or, one token at a time, while other requests come and go:

        generation = engine.add(Request(tokenizer.prompt("Once"), on_text=print))
        while engine.busy:
            engine.step()

    The completion of a request depends on its prompt, settings and seed alone. Where `exact` is
    True (our kernels: float32 and bfloat16 on a CPU), so do its log-probabilities, bit for bit,
    whatever else is in the batch or in the cache. Elsewhere other requests can change them by
    rounding, and so the choice between two equally likely tokens. Ids beyond the tokenizer's
    vocabulary, which a padded model has, are never sampled. Keep the engine for prompts that share
    a prefix, such as the turns of a chat: the longest cached prefix is not read again.
    tokenizer: needed for prompts that are text, stop strings, and the text and end of the results.
    max_batch_size: requests that run at the same time; the others wait, at most max_waiting of them
    (default: any number). cache_tokens: tokens whose keys and values are in memory at the same
    time, at least the model's context (default: grows as needed, up to max_batch_size contexts).
    weights: int8 or int4 quantizes them, where our kernels run. keep_model=False: free the model's
    own weights once the kernels have a copy; neither the model nor `refresh` can then be used.
    draft_model: a smaller model with the same tokenizer, which generates tokens that this one
    verifies at once; it has a cache of its own, as large. draft_tokens: verified in a step, at most
    (default: 4 of a draft model, otherwise 0); without a draft model, they are what followed when
    the newest tokens of the sequence occurred before. page: tokens of a page, for PyTorch's
    operations. chunk, budget: see Scheduler; BUDGET_PER_REQUEST limits any budget, too.
    ValueError for a mask that depends on the row of the batch, for too small a cache, and for
    quantized weights where our kernels do not run.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        *,
        max_waiting: int | None = None,
        cache_tokens: int | None = None,
        weights: str = "auto",
        draft_model: GPTModel | None = None,
        draft_tokens: int | None = None,
        keep_model: bool = True,
        page: int | None = None,
        chunk: int | None = None,
        budget: int | None = None,
    ) -> None:
        if model.mask.properties.uses_b:
            raise ValueError(
                f"the mask {model.mask.expression} depends on the row of the batch: generated texts"
                " must not depend on their neighbours; use a mask without b"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._limit = limit = model.config.context_length
        self._V = min(x.vocab_size for x in (model.config, tokenizer) if x is not None)
        if cache_tokens is not None and cache_tokens < limit:
            raise ValueError(
                f"cache_tokens of {cache_tokens:,} is less than the model's context of {limit:,}:"
                " one text may need that many"
            )
        # A text shorter than this cannot be cached, as later tokens change what earlier ones see.
        self.lookahead = model.mask.lookahead(limit, model.config.n_head)
        self._draft_model = None
        if draft_model is not None:
            if draft_model.config.vocab_size < self._V:
                raise ValueError(
                    f"the draft model has {draft_model.config.vocab_size:,} ids and the model"
                    f" {self._V:,}: both need the same tokenizer"
                )
            drafting = Engine(
                draft_model,
                max_batch_size=max_batch_size,
                cache_tokens=cache_tokens and max(cache_tokens, draft_model.config.context_length),
                weights=weights,
                keep_model=keep_model,
            )
            self._draft_model = DraftModel(drafting, self._V)
        if draft_tokens is None:
            draft_tokens = 0 if draft_model is None else DRAFT_TOKENS
        self._forward = make_forward(model, weights, page, keep_model=keep_model)
        page = self._forward.page
        context = -(-limit // page) + 1  # pages of a text, and one to copy the end of another
        most = max(context, cache_tokens // page) if cache_tokens else max_batch_size * context
        idle = most if cache_tokens else 2 * context
        self._pages = Pages(page, most, model.mask.window, idle)
        kind = self._device.type
        self._scheduler = Scheduler(
            self._pages,
            max_batch_size,
            chunk=chunk or CHUNK.get(kind, CHUNK["cpu"]),
            budget=budget or BUDGET.get(kind, BUDGET["cpu"]),
            budget_per_request=BUDGET_PER_REQUEST.get(kind, BUDGET_PER_REQUEST["cpu"]),
            lookahead=self.lookahead,
            max_waiting=max_waiting,
            draft_tokens=draft_tokens,
        )

    def __repr__(self) -> str:
        unfinished = sum(not state.finished for state in self._scheduler.states)
        model = f"{self.model.config.n_layer} layers, context {self._limit:,}, on {self._device}"
        return f"Engine({model}, {unfinished} unfinished requests)"

    # Requests

    @property
    def exact(self) -> bool:
        """Whether log-probabilities are bit-identical whatever else is in the batch."""
        return self._forward.exact

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return any(not state.finished for state in self._scheduler.states)

    @property
    def needs_step(self) -> bool:
        """Whether `step` has work: unfinished requests, or pages of finished ones to release."""
        return bool(self._scheduler.states)

    @property
    def remaining_capacity(self) -> int | None:
        """How many requests `add` accepts now; None: any number."""
        return self._scheduler.remaining_capacity

    @property
    def stats(self) -> Stats:
        """May be read from another thread."""
        return self._scheduler.stats

    @property
    def draft_stats(self) -> Stats | None:
        """Those of the draft model, which has requests and pages of its own; None without one."""
        return None if self._draft_model is None else self._draft_model.engine.stats

    def add(self, request: Request) -> Generation:
        """Queue a request; `step` extends the generation that this returns.

        ValueError for an empty prompt, an id outside the vocabulary, an empty stop string, stop
        strings, on_text or a constraint without a tokenizer, a constraint that `compile` rejects,
        and a prompt longer than the context with context_shift off. QueueFull where
        `remaining_capacity` is 0.
        """
        request.check(self._V, self._limit, self.tokenizer is not None)
        stop_ids = request.stop_ids
        if stop_ids is None:
            stop_ids = () if self.tokenizer is None else self.tokenizer.special_ids.eos_ids
        stream = None if self.tokenizer is None else self.tokenizer.stream(request.prompt)
        matcher = request.constraint
        if isinstance(matcher, Constraint):
            matcher = self.compile(matcher)
        state = RequestState(request, frozenset(stop_ids), self._limit, stream, matcher)
        if state.remaining or state.scores_prompt:
            self._scheduler.add(state)
        else:
            state.generation.finish_reason = "length"
        return state.generation

    def compile(self, constraint: Constraint) -> Matcher:
        """Compile a constraint for one request, in which it replaces the constraint. This can take
        half a second; unlike `add`, it may be called from another thread.

        ValueError without llguidance, for a tokenizer whose ids do not stand for fixed bytes, and
        for a constraint that is wrong, too large, or that no text meets.
        """
        return self._compiler.compile(constraint)

    def cancel(self, generation: Generation) -> None:
        """Finish a request now, with the text so far; the next step releases its pages. May be
        called from another thread."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"

    def refresh(self) -> None:
        """Forget all cached keys and values: call it when the model's weights have changed.
        Unfinished requests continue with the new weights."""
        self._scheduler.preempt_all()
        self._forward.refresh()
        if self._draft_model is not None:
            self._draft_model.engine.refresh()

    def _restart(self) -> None:
        self._scheduler.preempt_all()
        self._forward.clear()

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        context_shift: bool = True,
        constraint: Constraint | None = None,
    ) -> list[Generation]:
        """Continue every prompt to its end: one text, or several texts or token ids.

        Prompt i has the seed sampling.seed + i. An empty text starts a new document. The other
        arguments are those of Request, the errors those of `add`.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        check_several(several, "prompts")
        encoded = [self._encode(prompt) for prompt in several]
        generations: dict[int, Generation] = {}
        # Prompts of similar length run together: little padding.
        for i in sorted(range(len(encoded)), key=lambda i: len(encoded[i])):
            request = Request(
                encoded[i],
                sampling.with_seed(sampling.seed + i),
                stop,
                stop_ids,
                context_shift=context_shift,
                constraint=constraint,
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
            busy = self.busy
            finished = [g for g in pending.values() if g.finish_reason is not None or not busy]
            for generation in finished:
                del pending[id(generation)]
                yield generation
            if pending and self.busy:
                self.step()

    # A step

    def step(self) -> list[Generation]:
        """Add one token to every request whose prompt is read, and read more of the other prompts;
        waiting requests join while there is room.

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
            for state in self._scheduler.states:
                self.cancel(state.generation)
            self._scheduler.remove_finished()
            self._restart()  # the pass may have stopped halfway
            raise
        finally:
            if training:
                self.model.train()

    def _step(self) -> list[Generation]:
        if self._draft_model is not None:
            self._draft_model.draft(self._scheduler.decoding, self._scheduler.draft_tokens)
        spans = self._scheduler.schedule()
        if not spans:
            if self._draft_model is not None:
                self._draft_model.release()
            return []
        self._forward.cache.grow(self._pages.made)
        for source, target in self._pages.copies:
            self._forward.cache.copy(source, target)
        self._pages.copies.clear()
        decoded = self._forward.decode(spans, self._V)
        vectors = self._forward.hidden(
            spans, [i for i in range(len(spans)) if i not in decoded.tokens]
        )
        self._scheduler.read(spans)
        for i, start in vectors.starts.items():
            span = spans[i]
            if not span.pages:
                span.state.generation.notice = (
                    f"under the mask {self.model.mask.expression} tokens see later ones, up to"
                    f" position {self.lookahead - 1}: until the text is that long, the KV cache"
                    " cannot be used and each new token requires reading the whole text again"
                )
            if span.state.scores_prompt:
                self._score_prompt(span, vectors.x[start : start + len(span.ids)])
        ready = [i for i, s in enumerate(spans) if s.stop - len(s.draft) == len(s.state.context)]
        states = [spans[i].state for i in ready]
        if ready:
            logits, rows = next_logits(self._forward, spans, ready, vectors, decoded, self._V)
            extend(
                states,
                [spans[i].draft for i in ready],
                logits,
                [rows.get(i, -1) for i in ready],
                [decoded.tokens.get(i, -1) for i in ready],
                self._forward.sample,
            )
            self._scheduler.accept(states)
        return [state.generation for state in states if state.finished]

    def _score_prompt(self, span: Span, vectors: Tensor) -> None:
        """Record what the request asks for about its prompt: the mean of these vectors of a span,
        the log-probabilities of the tokens behind each."""
        if span.state.generation.mean_vector is not None:
            span.state.generation.mean_vector.add(span.start, vectors)
        if span.state.request.prompt_logprobs is None:
            return
        found = span.state.generation.prompt_logprobs
        if not found:
            found.append(None)  # nothing is before the first token
        for start in range(0, len(vectors), SCORED):
            logits = self._forward.logits(vectors[start : start + SCORED], self._V)
            score_prompt(span.state, span.start + start + 1, logits)

    # Checks

    @property
    def _device(self) -> torch.device:
        return self._forward.device

    @cached_property
    def _compiler(self) -> ConstraintCompiler:
        if self.tokenizer is None:
            raise ValueError("a constraint needs a tokenizer: Engine(model, tokenizer)")
        return ConstraintCompiler(self.tokenizer, self._V)

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if hasattr(prompt, "tolist"):  # a tensor or an array of ids
            prompt = prompt.tolist()
        if isinstance(prompt, int):
            raise ValueError(
                f"prompt {prompt} is a token id: several prompts of ids are [[...], ...]"
            )
        if not isinstance(prompt, str):
            return token_ids(prompt, "prompt")
        if self.tokenizer is None:
            raise ValueError("a prompt that is text needs a tokenizer: Engine(model, tokenizer)")
        return self.tokenizer.prompt(prompt)

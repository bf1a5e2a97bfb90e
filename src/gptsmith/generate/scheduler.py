"""Which tokens of which requests the model reads in a step. No tensors here.

Requests that are decoding come first, one token each. The step's token budget is for prompts, which
are read up to multiples of a chunk. It grows with the number of requests: a few do not wait long
for each other's prompts, and many get through their prompts as fast as through their answers. Long
and short prompts take turns. Sources: nano-vllm's scheduler, and Sarathi-Serve (Agrawal et al.
2024) for the chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from gptsmith.generate.pages import Pages
from gptsmith.generate.request import QueueFull, RequestState


class Span(NamedTuple):
    """Consecutive tokens of a request to be read: those at start, start + 1 ... of its context.

    draft: the last of the ids, if they are draft tokens beyond the context.
    """

    state: RequestState
    start: int
    ids: Sequence[int]
    draft: Sequence[int] = ()

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    @property
    def pages(self) -> Sequence[int]:
        """Pages of the sequence, from number `first` on; empty if it is not cached."""
        return () if self.state.table is None else self.state.table.numbers

    @property
    def first(self) -> int:
        return 0 if self.state.table is None else self.state.table.first


class Stats(NamedTuple):
    """Requests and pages at present; tokens since the engine was created.

    tokens_computed: read by the model, including draft tokens. cached_tokens: of prompts, found in
    the cache. accepted_drafts: draft tokens that were generated.
    """

    waiting: int
    running: int
    pages_used: int
    pages_limit: int
    tokens_computed: int
    cached_tokens: int
    accepted_drafts: int


class Scheduler:
    """Decides which requests run, which wait, and which pages they use.

    chunk: prompts are read up to multiples of it, one at least. budget: tokens of prompts in a
    step. budget_per_request: while any request decodes, the budget is this many tokens per running
    request, at least one chunk and at most `budget`; None: always `budget`. lookahead: see
    Mask.lookahead; a shorter sequence is not cached, but read again in each step. max_waiting:
    requests that may wait while max_batch_size others run; `add` raises QueueFull beyond it.
    draft_tokens: draft tokens of a request in a step.

    When no page is left, the request that started last is preempted: it waits, and is read again
    later.
    """

    def __init__(
        self,
        pages: Pages,
        max_batch_size: int,
        *,
        chunk: int,
        budget: int,
        budget_per_request: int | None = None,
        lookahead: int = 0,
        max_waiting: int | None = None,
        draft_tokens: int = 0,
    ) -> None:
        self.pages = pages
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self.chunk, self.lookahead = chunk, lookahead
        self.budget, self.budget_per_request = budget, budget_per_request
        self.draft_tokens = draft_tokens
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []  # in the order in which they started
        self._shortest_first = False
        self._computed = self._cached = self._accepted = 0

    @property
    def states(self) -> list[RequestState]:
        return [*self.running, *self.waiting]

    @property
    def stats(self) -> Stats:
        """May be read from another thread, so it counts in copies: a deque that changes meanwhile
        raises an error."""
        pages = self.pages
        waiting, running = (
            sum(not state.finished for state in [*states])
            for states in (self.waiting, self.running)
        )
        return Stats(
            waiting, running, pages.used, pages.limit, self._computed, self._cached, self._accepted
        )

    @property
    def remaining_capacity(self) -> int | None:
        """How many requests `add` accepts now; None: any number."""
        if self.max_waiting is None:
            return None
        unfinished = sum(not state.finished for state in self.states)
        return max(0, self.max_batch_size + self.max_waiting - unfinished)

    def add(self, state: RequestState) -> None:
        if self.remaining_capacity == 0:
            limit = self.max_batch_size + (self.max_waiting or 0)
            raise QueueFull(f"{limit} requests are unfinished, which is the limit")
        self.waiting.append(state)

    @property
    def decoding(self) -> list[RequestState]:
        """Running requests that get a new token in the next step and can verify a draft."""
        return [
            state
            for state in self.running
            if state.table is not None
            and len(state.context) - state.read == 1
            and not (state.finished or state.scores_prompt or self._must_restart(state))
        ]

    def schedule(self) -> list[Span]:
        """What to read in this step; every request appears at most once."""
        self.remove_finished()
        for state in [state for state in reversed(self.running) if self._must_restart(state)]:
            self._preempt(state)
        spans, prompts = [], []
        at = 0
        while at < len(self.running):  # in the order in which they started; the last one may go
            state, at = self.running[at], at + 1
            if state.table is not None and len(state.context) - state.table.length > 1:
                prompts.append(state)
            elif self._reserve(state):
                spans.append(self._with_draft(self._span(state, len(state.context))))
        prompts += self._admit()
        left = budget = self._prompt_budget(len(spans))
        for state in self._in_turn(prompts):
            chunks = state.read // self.chunk + max(1, left // self.chunk)
            span = self._span(state, chunks * self.chunk)
            if len(span.ids) <= left or left == budget:
                spans.append(span)
                left -= len(span.ids)
        return spans

    def read(self, spans: Sequence[Span]) -> None:
        """Record that these have been read: their keys and values can be shared."""
        for span in spans:
            self._computed += len(span.ids)
            if span.state.table is not None:
                self.pages.fill(span.state.table, span.stop - len(span.draft))

    def accept(self, states: Sequence[RequestState]) -> None:
        """Record new tokens of requests; all but the last of them have been read as drafts."""
        for state in states:
            if state.table is not None and state.table.length < len(state.context) - 1:
                self._accepted += len(state.context) - 1 - state.table.length
                self.pages.fill(state.table, len(state.context) - 1)

    def remove_finished(self) -> None:
        """Remove finished requests and release their pages."""
        gone = [state for state in self.states if state.finished]
        for state in gone:
            if state.table is not None:
                self.pages.close(state.table)
                state.table = None
        if gone:
            self.running = [state for state in self.running if not state.finished]
            self.waiting = deque(state for state in self.waiting if not state.finished)

    def preempt_all(self) -> None:
        """Read all requests again: the weights have changed, or a step has failed."""
        for state in reversed(list(self.running)):
            self._preempt(state)
        self.pages.clear()

    def _prompt_budget(self, decoding: int) -> int:
        """Tokens of prompts in a step in which so many requests decode."""
        if not decoding or self.budget_per_request is None:
            return self.budget
        return min(self.budget, max(self.chunk, self.budget_per_request * len(self.running)))

    def _in_turn(self, prompts: list[RequestState]) -> list[RequestState]:
        """In which order prompts get the budget: those with the fewest tokens left first, as they
        would wait long for the others; in every second step the oldest, which would never end
        where short ones keep coming."""
        if len(prompts) > 1:
            self._shortest_first = not self._shortest_first
            if self._shortest_first:
                return sorted(prompts, key=lambda state: len(state.context) - state.read)
        return prompts

    def _span(self, state: RequestState, stop: int) -> Span:
        stop = min(len(state.context), max(stop, self.lookahead))
        return Span(state, state.read, state.context[state.read : stop])

    def _with_draft(self, span: Span) -> Span:
        """The span with draft tokens, if there are any and pages for them."""
        state, table = span.state, span.state.table
        if not self.draft_tokens or table is None or state.scores_prompt:
            return span
        draft = state.draft(self.draft_tokens)
        if not draft or not self.pages.extend(table, len(state.context) + len(draft)):
            return span
        return Span(state, span.start, [*span.ids, *draft], draft)

    def _must_restart(self, state: RequestState) -> bool:
        """Whether a running request must be read again: it is longer than the model's context, or
        long enough now to be cached."""
        if state.table is None:
            return len(state.context) >= self.lookahead
        return state.too_long

    def _reserve(self, state: RequestState) -> bool:
        """Allocate a page for the newest token of a request, preempting later ones if need be.
        Returns whether it is still running."""
        while state.table is not None and not self.pages.extend(state.table, len(state.context)):
            last = self.running[-1]
            self._preempt(last)
            if last is state:
                return False
        return True

    def _preempt(self, state: RequestState) -> None:
        """Let a request wait. Its pages can be found until they are evicted."""
        if state.table is not None:
            self.pages.close(state.table)
            state.table = None
        self.running.remove(state)
        self.waiting.appendleft(state)

    def _admit(self) -> list[RequestState]:
        """Start waiting requests while the batch has places and there are pages."""
        admitted: list[RequestState] = []
        passed: list[RequestState] = []  # they wait for a prefix that others are reading
        while self.waiting and len(self.running) < self.max_batch_size:
            state = self.waiting[0]
            state.shift()
            if self._prefix_is_being_read(state):
                passed.append(self.waiting.popleft())
                continue
            if len(state.context) >= self.lookahead and not self._allocate(state):
                break
            self.waiting.popleft()
            self.running.append(state)
            admitted.append(state)
        self.waiting.extendleft(reversed(passed))
        return admitted

    def _allocate(self, state: RequestState) -> bool:
        """Allocate pages for the whole context of a request, if a page is left for each that
        runs."""
        table = self.pages.open(
            state.context, self._namespace(state), reuse=not state.scores_prompt
        )
        missing = -(-len(state.context) // self.pages.size) - table.first - len(table.numbers)
        if self.running and missing + len(self.running) > self.pages.available:
            self.pages.close(table, keep=False)
            return False
        self.pages.extend(table, len(state.context))
        self._cached += table.length
        state.table = table
        if not state.generation.ids:
            state.generation.cached_tokens = table.length
        return True

    def _namespace(self, state: RequestState) -> Hashable:
        # Under such a mask, keys and values of the first tokens depend on all up to the lookahead.
        return state.request.namespace, tuple(state.context[: self.lookahead])

    def _prefix_is_being_read(self, state: RequestState) -> bool:
        """Whether a running prompt is about to read a page that this one shares: waiting is better
        than reading it twice."""
        size, usable = self.pages.size, len(state.context) - 1
        if state.scores_prompt or usable < size:
            return False
        for other in self.running:
            until = other.read + size
            if (
                other.table is not None
                and len(other.context) - other.read > 1
                and until <= min(usable, len(other.context))
                and other.context[:until] == state.context[:until]
                and self._namespace(other) == self._namespace(state)
            ):
                return True
        return False

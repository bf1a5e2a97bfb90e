"""Which tokens of which requests the model reads in a step. No tensors here.

Requests that are decoding come first, one token each. The step's token budget is for prompts, which
are read in chunks that end at fixed positions, so that a prompt is split in the same places
whatever else is in the batch. Sources: nano-vllm's scheduler, and Sarathi-Serve (Agrawal et al.
2024) for the chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from gptsmith.generate.pages import Pages
from gptsmith.generate.request import QueueFull, Row


class Span(NamedTuple):
    """Consecutive tokens of a request to be read: those at start, start + 1 ... of its context.

    all_vectors: the hidden vectors of all of them are needed, not only that of the last. draft: the
    last of the ids, if they are draft tokens beyond the context.
    """

    row: Row
    start: int
    ids: Sequence[int]
    all_vectors: bool = False
    draft: Sequence[int] = ()

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    @property
    def pages(self) -> Sequence[int]:
        """Pages of the sequence, from number `first` on; empty if it is not cached."""
        return () if self.row.table is None else self.row.table.numbers

    @property
    def first(self) -> int:
        return 0 if self.row.table is None else self.row.table.first


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

    chunk: prompts are read up to the next multiple of it. budget: tokens of prompts in a step; one
    chunk is always read. lookahead: see Mask.lookahead; a shorter sequence is not cached, but read
    again in each step. max_waiting: requests that may wait while max_batch_size others run; `add`
    raises QueueFull beyond it. draft_tokens: draft tokens of a request in a step.

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
        lookahead: int = 0,
        max_waiting: int | None = None,
        draft_tokens: int = 0,
    ) -> None:
        self.pages = pages
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self.chunk, self.budget, self.lookahead = chunk, budget, lookahead
        self.draft_tokens = draft_tokens
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in the order in which they started
        self._computed = self._cached = self._accepted = 0

    @property
    def rows(self) -> list[Row]:
        return [*self.running, *self.waiting]

    @property
    def stats(self) -> Stats:
        pages = self.pages
        waiting, running = (
            sum(not row.finished for row in rows) for rows in (self.waiting, self.running)
        )
        return Stats(
            waiting, running, pages.used, pages.limit, self._computed, self._cached, self._accepted
        )

    @property
    def room(self) -> int | None:
        """How many requests `add` accepts now; None: any number."""
        if self.max_waiting is None:
            return None
        unfinished = sum(not row.finished for row in self.rows)
        return max(0, self.max_batch_size + self.max_waiting - unfinished)

    def add(self, row: Row) -> None:
        if self.room == 0:
            limit = self.max_batch_size + (self.max_waiting or 0)
            raise QueueFull(f"{limit} requests are unfinished, which is the limit")
        self.waiting.append(row)

    @property
    def decoding(self) -> list[Row]:
        """Running requests that get a new token in the next step and can verify a draft."""
        return [
            row
            for row in self.running
            if row.table is not None
            and len(row.context) - row.read == 1
            and not (row.finished or row.scores_prompt or self._must_restart(row))
        ]

    def schedule(self) -> list[Span]:
        """What to read in this step; every request appears at most once."""
        self.remove_finished()
        for row in [row for row in reversed(self.running) if self._must_restart(row)]:
            self._preempt(row)
        spans = []
        for row in list(self.running):  # in the order in which they started
            newest = row.table is None or len(row.context) - row.read == 1
            if newest and row in self.running and self._reserve(row):
                spans.append(self._with_draft(self._span(row, len(row.context))))
        budget = self.budget
        decoding = {id(span.row) for span in spans}
        reading = [row for row in self.running if id(row) not in decoding]
        for row in reading + self._admit():
            span = self._span(row, (row.read // self.chunk + 1) * self.chunk)
            if len(span.ids) <= budget or budget == self.budget:
                spans.append(span)
                budget -= len(span.ids)
        return spans

    def read(self, spans: Sequence[Span]) -> None:
        """Record that these have been read: their keys and values can be shared."""
        for span in spans:
            self._computed += len(span.ids)
            if span.row.table is not None:
                self.pages.fill(span.row.table, span.stop - len(span.draft))

    def accept(self, rows: Sequence[Row]) -> None:
        """Record new tokens of the rows; all but the last of them have been read as drafts."""
        for row in rows:
            if row.table is not None and row.table.length < len(row.context) - 1:
                self._accepted += len(row.context) - 1 - row.table.length
                self.pages.fill(row.table, len(row.context) - 1)

    def remove_finished(self) -> None:
        """Remove finished requests and release their pages."""
        gone = [row for row in self.rows if row.finished]
        for row in gone:
            if row.table is not None:
                self.pages.close(row.table)
                row.table = None
        if gone:
            self.running = [row for row in self.running if not row.finished]
            self.waiting = deque(row for row in self.waiting if not row.finished)

    def preempt_all(self) -> None:
        """Read all requests again: the weights have changed, or a step has failed."""
        for row in reversed(list(self.running)):
            self._preempt(row)
        self.pages.clear()

    def _span(self, row: Row, stop: int) -> Span:
        stop = min(len(row.context), max(stop, self.lookahead))
        return Span(row, row.read, row.context[row.read : stop], row.scores_prompt)

    def _with_draft(self, span: Span) -> Span:
        """The span with draft tokens, if there are any and pages for them."""
        row, table = span.row, span.row.table
        if not self.draft_tokens or table is None or span.all_vectors:
            return span
        draft = row.draft(self.draft_tokens)
        if not draft or not self.pages.extend(table, len(row.context) + len(draft)):
            return span
        return Span(row, span.start, [*span.ids, *draft], True, draft)

    def _must_restart(self, row: Row) -> bool:
        """Whether a running request must be read again: it is longer than the model's context, or
        long enough now to be cached."""
        if row.table is None:
            return len(row.context) >= self.lookahead
        return row.too_long

    def _reserve(self, row: Row) -> bool:
        """Allocate a page for the newest token of a row, preempting later ones if need be; returns
        whether the row is still running."""
        while row.table is not None and not self.pages.extend(row.table, len(row.context)):
            self._preempt(self.running[-1])
        return row in self.running

    def _preempt(self, row: Row) -> None:
        """Let a row wait. Its pages can be found until they are evicted."""
        if row.table is not None:
            self.pages.close(row.table)
            row.table = None
        self.running.remove(row)
        self.waiting.appendleft(row)

    def _admit(self) -> list[Row]:
        """Start waiting rows while the batch has places and there are pages."""
        admitted: list[Row] = []
        passed: list[Row] = []  # they wait for a prefix that others are reading
        while self.waiting and len(self.running) < self.max_batch_size:
            row = self.waiting[0]
            row.shift()
            if self._prefix_is_being_read(row):
                passed.append(self.waiting.popleft())
                continue
            if len(row.context) >= self.lookahead and not self._allocate(row):
                break
            self.waiting.popleft()
            self.running.append(row)
            admitted.append(row)
        self.waiting.extendleft(reversed(passed))
        return admitted

    def _allocate(self, row: Row) -> bool:
        """Allocate pages for the whole context of a row, if a page is left for each running row."""
        table = self.pages.open(row.context, self._namespace(row), reuse=not row.scores_prompt)
        missing = -(-len(row.context) // self.pages.size) - table.first - len(table.numbers)
        if self.running and missing + len(self.running) > self.pages.available:
            self.pages.close(table, keep=False)
            return False
        self.pages.extend(table, len(row.context))
        self._cached += table.length
        row.table = table
        if not row.generation.ids:
            row.generation.cached_tokens = table.length
        return True

    def _namespace(self, row: Row) -> Hashable:
        # Under such a mask, keys and values of the first tokens depend on all up to the lookahead.
        return row.request.namespace, tuple(row.context[: self.lookahead])

    def _prefix_is_being_read(self, row: Row) -> bool:
        """Whether a running prompt is about to read a page that this one shares: waiting is better
        than reading it twice."""
        if row.scores_prompt:
            return False
        size, usable = self.pages.size, len(row.context) - 1
        for other in self.running:
            until = other.read + size
            if (
                other.table is not None
                and len(other.context) - other.read > 1
                and until <= min(usable, len(other.context))
                and other.context[:until] == row.context[:until]
                and self._namespace(other) == self._namespace(row)
            ):
                return True
        return False

"""The thread that runs the engines and reports their progress to the event loop.

HTTP, JSON and templates are not its concern. A slow client delays no other: it reads the latest
state when it is ready, and takes the difference to what it has received.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from gptsmith import terminal
from gptsmith.generate.engine import Engine
from gptsmith.generate.request import Generation, QueueFull, Request
from gptsmith.serve.metrics import Metrics


class CompletionProgress(NamedTuple):
    """How far a completion has come: its text, the number of its tokens, why it ended."""

    text: str = ""
    length: int = 0
    finish_reason: str | None = None

    @classmethod
    def of(cls, generation: Generation) -> CompletionProgress:
        return cls(generation.text, len(generation.ids), generation.finish_reason)


class Ticket:
    """The engine requests of one HTTP request and their progress. Belongs to the event loop that
    submitted them."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.requests = engine, requests
        self.generations: list[Generation] = []
        self.progress: tuple[CompletionProgress, ...] = (CompletionProgress(),) * len(requests)
        self.error: Exception | None = None
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self.error is not None or all(p.finish_reason for p in self.progress)

    async def updates(self) -> AsyncIterator[tuple[CompletionProgress, ...]]:
        """The progress of the requests, whenever it has changed, until all have finished.

        Raises the error that ended them."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            if self.error is not None:
                raise self.error
            progress = self.progress
            yield progress
            if all(p.finish_reason for p in progress):
                return

    async def result(self) -> list[Generation]:
        """The finished generations; raises as `updates` does."""
        async for _ in self.updates():
            pass
        return self.generations


class Worker(threading.Thread):
    """Runs the engines, one step of each busy one in turn, so models share the machine fairly.

    max_running: requests that each engine runs at the same time. max_waiting: further requests that
    may wait, of all engines together; those for one model never take the places of another.
    """

    def __init__(
        self, engines: Sequence[Engine], max_running: int, max_waiting: int, metrics: Metrics
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.engines, self.metrics = engines, metrics
        self.max_running, self.max_waiting = max_running, max_waiting
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._tickets: list[Ticket] = []
        self._unfinished = Counter[Engine]()  # requests; changed by the event loop alone

    @property
    def unfinished_requests(self) -> int:
        """Number of requests that run or wait."""
        return self._unfinished.total()

    # Called by the event loop

    def check_queue(self, engine: Engine, count: int) -> None:
        """QueueFull if so many further requests for an engine were too many. Handlers ask before
        they do what takes time, such as encoding a prompt."""
        after = self._unfinished + Counter({engine: count})
        if sum(max(0, n - self.max_running) for n in after.values()) > self.max_waiting:
            self.metrics.rejected.inc()
            raise QueueFull(f"{self.unfinished_requests} requests are running or waiting")

    def submit(self, engine: Engine, requests: Sequence[Request]) -> Ticket:
        """Queue requests for an engine. QueueFull if too many are waiting; if the engine rejects
        one, `updates` raises its ValueError."""
        self.check_queue(engine, len(requests))
        ticket = Ticket(engine, requests)
        self._unfinished[engine] += len(requests)
        self._post(lambda: self._start(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancel the requests that have not finished."""
        if not ticket.is_done:
            self._post(lambda: self._cancel(ticket))

    def end_all(self, error: Exception) -> None:
        """End all requests, running or waiting, with an error."""
        self._post(lambda: self._fail(self._tickets, error))

    def close(self) -> None:
        """End the thread after its current step."""
        self._closed = True
        self._wake.set()
        self.join()

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        self._wake.set()

    def _notify(self, tickets: Sequence[tuple[Ticket, bool]]) -> None:
        """Wake the handlers of these tickets, and no longer count the requests of those done."""
        for ticket, is_done in tickets:
            if is_done:
                self._unfinished[ticket.engine] -= len(ticket.requests)
            ticket.changed.set()

    # In the thread

    def run(self) -> None:
        while True:
            self._wake.clear()
            if self._closed:  # looked at after `clear`, which could undo the wake of `close`
                return
            while self._inbox:
                self._inbox.popleft()()
            busy = [engine for engine in self.engines if engine.needs_step]
            for engine in busy:
                self._step(engine)
            self._publish()
            if not busy:
                self._wake.wait()

    def _start(self, ticket: Ticket) -> None:
        self._tickets.append(ticket)
        try:
            for request in ticket.requests:
                ticket.generations.append(ticket.engine.add(request))
        except Exception as error:
            self._cancel(ticket)
            ticket.error = error

    def _cancel(self, ticket: Ticket) -> None:
        for generation in ticket.generations:
            ticket.engine.cancel(generation)

    def _step(self, engine: Engine) -> None:
        try:
            engine.step()
        except Exception as error:  # the engine has cancelled its requests and can go on
            terminal.note("".join(traceback.format_exception(error)).rstrip())
            self._fail([ticket for ticket in self._tickets if ticket.engine is engine], error)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        for ticket in tickets:
            self._cancel(ticket)
            ticket.error = error

    def _publish(self) -> None:
        """Tell the clients whose completions have changed."""
        now = time.perf_counter()
        changed = []
        for ticket in self._tickets:
            if failed := [g.error for g in ticket.generations if g.error]:
                self._fail([ticket], ValueError(failed[0]))
            progress = tuple(map(CompletionProgress.of, ticket.generations))
            if progress != ticket.progress or ticket.error is not None:
                if ticket.first_token is None and any(p.length for p in progress):
                    ticket.first_token = now
                ticket.progress = progress
                changed.append(ticket)
                if ticket.is_done:
                    self.metrics.finished(ticket, now)
        self._tickets = [ticket for ticket in self._tickets if not ticket.is_done]
        for loop in {ticket.loop for ticket in changed}:
            mine = [(ticket, ticket.is_done) for ticket in changed if ticket.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._notify, mine)

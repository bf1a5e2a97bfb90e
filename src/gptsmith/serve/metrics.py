"""What /metrics reports, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from gptsmith.generate.engine import Engine
    from gptsmith.generate.scheduler import Stats
    from gptsmith.serve.worker import Ticket

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The metrics of one server, in a registry of their own: several servers fit in one process.

    A request is one completion; n completions of a prompt are n requests.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ours: dict[str, Any] = {"namespace": "gptsmith", "registry": self._registry}
        self.running = Gauge("running_requests", "Requests that are being generated", **ours)
        self.waiting = Gauge("waiting_requests", "Requests that wait", **ours)
        self.cache_used = Gauge("cache_used_ratio", "Used share of the KV cache", **ours)
        self.draft_cache_used = Gauge(
            "draft_cache_used_ratio", "Used share of the draft models' KV caches", **ours
        )
        self.accepted_drafts = Gauge(
            "accepted_draft_tokens", "Draft tokens that were generated", **ours
        )
        self.cached_tokens = Gauge("cached_tokens", "Prompt tokens found in the KV cache", **ours)
        self.rejected = Counter("rejected_requests", "Rejected: the queue was full", **ours)
        self.requests = Counter("requests", "Finished requests", ["finish_reason"], **ours)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of finished requests", **ours)
        self.new_tokens = Counter("new_tokens", "Generated tokens of finished requests", **ours)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            **ours,
        )
        self.per_token = Histogram(
            "time_per_token_seconds",
            "Mean time between the tokens of a request",
            buckets=_TOKEN_SECONDS,
            **ours,
        )

    def show(self, engines: Sequence[Engine]) -> None:
        """Set the gauges to the present state of the engines."""
        stats = [engine.stats for engine in engines]
        drafts = [engine.draft_stats for engine in engines]
        self.running.set(sum(s.running for s in stats))
        self.waiting.set(sum(s.waiting for s in stats))
        self.cached_tokens.set(sum(s.cached_tokens for s in stats))
        self.accepted_drafts.set(sum(s.accepted_drafts for s in stats))
        self.cache_used.set(_used(stats))
        self.draft_cache_used.set(_used([s for s in drafts if s is not None]))

    def finished(self, ticket: Ticket, now: float) -> None:
        """Count the requests of a ticket, which have ended."""
        for request, progress in zip(ticket.requests, ticket.progress, strict=False):
            self.requests.labels(progress.finish_reason or "error").inc()
            self.prompt_tokens.inc(len(request.prompt))
            self.new_tokens.inc(progress.length)
        if ticket.first_token is not None:
            self.first_token.observe(ticket.first_token - ticket.submitted)
            longest = max(progress.length for progress in ticket.progress)
            if longest > 1:
                self.per_token.observe((now - ticket.first_token) / (longest - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _used(stats: Sequence[Stats]) -> float:
    """The used share of all pages."""
    return sum(s.pages_used for s in stats) / max(1, sum(s.pages_limit for s in stats))

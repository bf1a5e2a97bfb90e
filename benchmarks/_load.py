"""Clients of an OpenAI-compatible server, and what they see: texts as they are streamed."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import httpx

TIMEOUT = 600.0  # seconds without a byte


class Load(NamedTuple):
    """What the clients of one load saw."""

    requests_per_second: float
    tokens_per_second: float
    first_token: float
    """Seconds from a request to its first text, median."""
    gap_p99: float
    """Seconds between two texts of a reply, 99th percentile."""
    tokens: int
    """Generated tokens of a request, mean, as the server counts them."""


async def _request(
    client: httpx.AsyncClient, model: str, prompt: str, tokens: int
) -> tuple[list[float], int]:
    """When the request was sent and its texts arrived, and how many tokens there were."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, count = [time.perf_counter()], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(line[:500])
            if any(choice["text"] for choice in chunk["choices"]):
                times.append(time.perf_counter())
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return times, count


async def _load(url: str, model: str, prompts: Sequence[str], clients: int, tokens: int) -> Load:
    waiting = list(reversed(prompts))
    replies: list[tuple[list[float], int]] = []
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:

        async def one_client() -> None:
            while waiting:
                replies.append(await _request(client, model, waiting.pop(), tokens))

        begin = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.perf_counter() - begin
    gaps = [b - a for times, _ in replies for a, b in pairwise(times[1:])]
    total = sum(count for _, count in replies)
    return Load(
        requests_per_second=len(replies) / seconds,
        tokens_per_second=total / seconds,
        first_token=statistics.median(times[1] - times[0] for times, _ in replies),
        gap_p99=statistics.quantiles(gaps, n=100)[-1],
        tokens=round(total / len(replies)),
    )


def load(url: str, model: str, prompts: Sequence[str], clients: int, tokens: int) -> Load:
    """Send all prompts from so many clients, each of which waits for its reply before it sends the
    next. RuntimeError for an error of the server."""
    return asyncio.run(_load(url, model, prompts, clients, tokens))


def first_answer(url: str, model: str) -> bool:
    """Whether the server answers yet."""
    body = {"model": model, "prompt": "The", "max_tokens": 1, "temperature": 0}
    try:
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT, trust_env=False)
    except httpx.TransportError:
        return False
    if response.status_code == 200:
        return True
    if response.status_code == 503:  # it is loading the model
        return False
    raise RuntimeError(f"{url}: {response.status_code} {response.text[:500]}")

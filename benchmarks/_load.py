"""Clients of an OpenAI-compatible server, and what they see: texts as they are streamed."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from itertools import pairwise
from typing import NamedTuple
from urllib.parse import urlsplit

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


def _request(url: str, model: str, prompt: str, tokens: int) -> tuple[list[float], int]:
    """When the request was sent and its texts arrived, and how many tokens there were.

    By http.client, with a connection for each request: the clients share the cores with the server,
    and httpx takes three times as much of them for each event."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", "Connection": "close"}
    address = urlsplit(url)
    assert address.hostname
    connection = HTTPConnection(address.hostname, address.port, timeout=TIMEOUT)
    with closing(connection):
        times, count = [time.perf_counter()], 0
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:500]!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(line[:500])
            if any(choice["text"] for choice in chunk["choices"]):
                times.append(time.perf_counter())
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    if count == 0:
        raise RuntimeError("the stream ended before its usage")
    return times, count


def load(url: str, model: str, prompts: Sequence[str], clients: int, tokens: int) -> Load:
    """Send all prompts from so many clients, each of which waits for its reply before it sends the
    next. RuntimeError or OSError for an error of the server, once the others have ended."""
    with ThreadPoolExecutor(clients) as threads:
        begin = time.perf_counter()
        replies = [*threads.map(lambda prompt: _request(url, model, prompt, tokens), prompts)]
        seconds = time.perf_counter() - begin
    gaps = [b - a for times, _ in replies for a, b in pairwise(times[1:])]
    total = sum(count for _, count in replies)
    return Load(
        requests_per_second=len(replies) / seconds,
        tokens_per_second=total / seconds,
        first_token=statistics.median(times[1] - times[0] for times, _ in replies if times[1:]),
        gap_p99=statistics.quantiles(gaps, n=100)[-1] if len(gaps) > 1 else math.nan,
        tokens=round(total / len(replies)),
    )


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

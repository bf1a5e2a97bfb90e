"""The real server under load for minutes: nothing is lost, mixed up or left behind.

    python tests/support/soak_server.py [--minutes 20] [--requests 2000] [--closed 1000]
    make soak-serve

32 clients ask two models for completions, streams, replies, scores and embeddings, each request
with a prompt of its own, while others close their connections in every state. Every answer must be
the one that its request got alone, bit for bit. When all requests and closed connections are done,
the load goes on until the time is over. The memory of the process must not grow after the first
half, and when the load ends nothing may be running, cached pages in use or connections open.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from api_server import chat_run
from server_process import serving

CLIENTS, CLOSERS = 32, 4
MODELS = ("chat", "other")
GROWTH_MB = 10  # of the memory in the second half, what an allocator may need
STATES = ("headers", "body", "queued", "computing", "streaming", "reset")


class Result(NamedTuple):
    """What happened. wrong: answers that were not those alone, requests without an answer, and
    what was left behind. memory: of the process in MB: at the start, the most in the first half
    and in the second half of the time."""

    answers: int
    distinct: int
    closed: Counter[str]
    memory: tuple[int, int, int]
    minutes: float
    wrong: list[str]


def client(url: str) -> httpx.Client:
    """Opens a connection for each request, since servers close idle ones at any time."""
    return httpx.Client(
        base_url=url, timeout=600, limits=httpx.Limits(max_keepalive_connections=0), verify=False
    )


def make_request(i: int, choose: random.Random) -> tuple[str, dict[str, Any]]:
    """Path and body of request i; no other has its prompt."""
    nonce = f"request {i}: " + "".join(choose.choices("abcdefgh ", k=choose.randint(1, 250)))
    body: dict[str, Any] = {"model": choose.choice(MODELS)}
    kind = i % 8
    if kind == 0:
        return "/v1/embeddings", body | {"input": nonce}
    body |= {
        "max_tokens": choose.randint(1, 40),
        "temperature": choose.choice([0, 0.7, 1]),
        "seed": i,
        "n": choose.choice([1, 1, 1, 3]),
        "return_token_ids": True,
        "stream": kind in (1, 2, 3),
    }
    if kind in (1, 4):
        body |= {"messages": [{"role": "user", "content": nonce}], "logprobs": True}
        return "/v1/chat/completions", body | {"top_logprobs": 2}
    return "/v1/completions", body | {"prompt": nonce, "echo": kind > 5, "logprobs": 3}


def ask(http: httpx.Client, request: tuple[str, dict[str, Any]]) -> str:
    """The content of an answer as text; the same for a stream, however it was cut."""
    path, body = request
    answer = http.post(path, json=body)
    answer.raise_for_status()
    if not body.get("stream"):
        found = answer.json()
        return json.dumps(found["choices"] if "choices" in found else found["data"])
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]", done
    texts: dict[int, list[Any]] = {i: ["", [], [], None] for i in range(body["n"])}
    for event in events:
        for choice in json.loads(event)["choices"]:
            text = texts[choice["index"]]
            text[0] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            text[1] += choice.get("token_ids", [])
            scored = choice["logprobs"] or {}
            text[2] += scored.get("token_logprobs") or [
                t["logprob"] for t in scored.get("content", [])
            ]
            text[3] = choice["finish_reason"]
    return json.dumps(texts)


def close_early(url: str, state: str, choose: random.Random) -> None:
    """Begin a long request, and close its connection in a state."""
    endless = dict.fromkeys(map(str, range(256, 262)), -100)
    body = json.dumps(
        {"model": choose.choice(MODELS), "prompt": "x" * choose.randint(1, 1000), "n": 2,
         "max_tokens": 900, "stream": state in ("streaming", "reset"), "logit_bias": endless}
    ).encode()  # fmt: skip
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    cut = {"headers": 50, "body": len(sent) - 20}.get(state)
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=600) as client:
        client.sendall(sent[:cut])
        if state == "computing":
            time.sleep(0.2)
        if state in ("streaming", "reset"):
            client.recv(choose.choice([1, 5000]))
        if state == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def memory(pid: int) -> int:
    """Resident memory of a process in MB."""
    [line] = [s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in s]
    return int(line.split()[1]) // 1024


def soak(
    folder: Path, minutes: float, requests: int, closed: int, say: Callable[[str], None] = print
) -> Result:
    """Runs are written to the folder. Linux only, because of /proc."""
    runs = [chat_run(folder / m, seed=i, context_length=2048).path for i, m in enumerate(MODELS)]
    with serving(*runs, "--cache-tokens", 20_000) as (process, url):
        with client(url) as http:
            result = _load(process.pid, http, minutes, requests, closed, say)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        assert process.stderr is not None
        errors = process.stderr.read()
        if code not in (0, -signal.SIGTERM) or errors:
            result.wrong.append(f"the server ended with code {code}: {errors[-2000:]}")
    return result


def _load(
    pid: int,
    http: httpx.Client,
    minutes: float,
    requests: int,
    closed: int,
    say: Callable[[str], None],
) -> Result:
    choose = random.Random(0)
    asked = [make_request(i, choose) for i in range(requests)]
    alone = [ask(http, request) for request in asked]
    sockets = len(os.listdir(f"/proc/{pid}/fd"))
    say(f"{requests:,} answers alone; {memory(pid)} MB")
    started = time.monotonic()
    end = started + minutes * 60
    order, lock = iter(range(10**9)), threading.Lock()
    closings: Counter[str] = Counter()
    wrong: list[str] = []
    answers = 0

    def ask_on() -> None:
        nonlocal answers
        while True:
            with lock:
                i = next(order)
            if i >= requests and time.monotonic() > end:
                return
            try:
                same = ask(http, asked[i % requests]) == alone[i % requests]
                problem = None if same else f"request {i % requests} has another answer"
            except Exception as error:
                problem = f"request {i % requests} is lost: {error!r}"
            with lock:
                answers += problem is None
                wrong.extend([problem] if problem else [])

    def close_on(number: int) -> None:
        mine = random.Random(number)
        while True:
            with lock:
                n = closings.total()
                if n >= closed and time.monotonic() > end:
                    return
                closings[STATES[n % len(STATES)]] += 1
            try:
                close_early(str(http.base_url), STATES[n % len(STATES)], mine)
            except Exception as error:
                wrong.append(f"a closed connection: {error!r}")
            time.sleep(0.1)

    threads = [threading.Thread(target=ask_on) for _ in range(CLIENTS)]
    threads += [threading.Thread(target=close_on, args=(n,)) for n in range(CLOSERS)]
    samples = [(0.0, memory(pid))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        if time.monotonic() - started - samples[-1][0] > 10:
            samples.append((time.monotonic() - started, memory(pid)))
            if len(samples) % 6 == 0:
                say(
                    f"{samples[-1][0] / 60:.0f} min: {answers:,} answers, {len(wrong)} wrong, "
                    f"{closings.total():,} closed, {samples[-1][1]} MB"
                )
    seconds = time.monotonic() - started
    samples.append((seconds, memory(pid)))
    wrong += _left(pid, http, sockets)
    first = max(mb for t, mb in samples if t <= seconds / 2)
    second = max(mb for t, mb in samples if t > seconds / 2)
    if second > first + GROWTH_MB:
        wrong.append(f"memory grew from {first} to {second} MB")
    found = (samples[0][1], first, second)
    return Result(answers, requests, closings, found, seconds / 60, wrong)


def _left(pid: int, http: httpx.Client, sockets: int) -> list[str]:
    """What is still there a minute after the last request, and should not be."""
    deadline = time.monotonic() + 60
    while True:
        lines = http.get("/metrics").text.splitlines()
        gauges = (
            "gptsmith_running_requests",
            "gptsmith_waiting_requests",
            "gptsmith_cache_used_ratio",
        )
        left = [line for line in lines if line.startswith(gauges) and not line.endswith(" 0.0")]
        open_now = len(os.listdir(f"/proc/{pid}/fd"))
        if open_now > sockets:
            left.append(f"{open_now - sockets} open files more than at the start")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a real server, and compare every answer.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="prompts")
    parser.add_argument("--closed", type=int, default=1000, help="connections closed early")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), given.minutes, given.requests, given.closed,
                     lambda line: print(line, flush=True))  # fmt: skip
    start, first, second = found.memory
    states = ", ".join(f"{state} {n}" for state, n in found.closed.items())
    print(
        f"{found.minutes:.1f} min, {CLIENTS} clients, {found.distinct:,} requests again and again"
    )
    print(f"answers as alone: {found.answers:,}; wrong, lost or left over: {len(found.wrong)}")
    print(f"connections closed early: {found.closed.total():,} ({states})")
    print(f"memory: {start} MB, at most {first} in the first half and {second} in the second")
    print(*found.wrong[:20], sep="\n")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())

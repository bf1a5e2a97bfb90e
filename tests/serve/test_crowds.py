"""Many clients at once, clients that leave, and a full queue."""

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from api_server import Api, chat_run, served, serving_models


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server that runs two texts, and lets four wait. Its model reads long texts."""
    run = chat_run(tmp_path_factory.mktemp("small") / "chat", context_length=4096)
    with serving_models(
        {"chat": served(run, max_batch_size=2)}, max_batch_size=2, max_queue=4
    ) as api:
        yield api


def long_request(**more: object) -> dict:
    """A text that would be generated for a long time."""
    return dict(model="chat", prompt="a", max_tokens=4000, temperature=0, **more)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def send(api: Api, body: bytes, length: int | None = None) -> socket.socket:
    """A raw connection that has sent a request for a completion, or says that it is longer."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (length or len(body), body)
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_frees_its_slot_in_every_state(small: Api, stream: bool) -> None:
    """Before the first token, in the middle, and while queued; neighbours are unharmed."""
    import json

    alone = small.post("/v1/completions", model="chat", prompt="zzz", max_tokens=20, seed=9)
    rng = random.Random(0)
    for _ in range(15):
        body = json.dumps(long_request(stream=stream)).encode()
        connections = [send(small, body) for _ in range(5)]  # two run, three wait
        time.sleep(rng.choice((0, 0.01, 0.05)))
        for connection in connections:
            if stream and rng.random() < 0.5:
                connection.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    connection.recv(100)
            connection.close()
        after = small.post("/v1/completions", model="chat", prompt="zzz", max_tokens=20, seed=9)
        assert after["choices"] == alone["choices"]
    small.until_idle()
    assert small.server.worker.unfinished_requests == 0


def test_half_a_request_leaves_no_traceback(small: Api, caplog: pytest.LogCaptureFixture) -> None:
    send(small, b'{"prompt": "a"}', length=100).close()
    assert small.client.get("/health").is_success
    time.sleep(0.1)
    assert caplog.records == []


def test_a_full_queue_is_said_at_once(small: Api) -> None:
    import json

    body = json.dumps(long_request(n=6)).encode()
    connection = send(small, body)
    wait_until(lambda: small.server.worker.unfinished_requests == 6)
    started = time.monotonic()
    response = small.client.post("/v1/completions", json=long_request())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert time.monotonic() - started < 10
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    # Before anything that takes time: these would be rejected by the compiler and the tokenizer.
    wrong = {"structured_outputs": {"regex": "("}}
    assert small.client.post("/v1/completions", json=long_request() | wrong).status_code == 429
    wrong = {"messages": [{"role": "nobody", "content": ""}], "prompt": None}
    chat = small.client.post("/v1/chat/completions", json=long_request() | wrong)
    assert chat.status_code == 429
    connection.close()
    small.until_idle()
    assert small.client.post("/v1/completions", json=long_request() | {"max_tokens": 1}).is_success


def test_a_flooded_model_does_not_hold_up_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in steps: a text of the other model, asked for while 30 long ones fill all places
    and the queue, joins at once, and waits for one step of the flood per token."""
    import json

    models = {
        name: served(chat_run(tmp_path / name, context_length=4096), name)
        for name in ("flooded", "other")
    }
    endless = {str(i): -100 for i in range(256, 262)}
    flood = long_request(logit_bias=endless) | {"model": "flooded"}
    happened: list[str] = []

    def spy(name: str, method: str) -> None:
        engine = models[name].engine
        call = getattr(engine, method)
        monkeypatch.setattr(
            engine, method, lambda *x: (happened.append(f"{name} {method}"), call(*x))[1]
        )

    with serving_models(models, max_batch_size=8, max_queue=22) as api:
        connections = [send(api, json.dumps(flood).encode()) for _ in range(30)]
        wait_until(lambda: api.server.worker.unfinished_requests == 30)
        assert api.client.post("/v1/completions", json=flood).status_code == 429
        for name in models:
            spy(name, "step")
        spy("other", "add")
        api.post("/v1/completions", model="other", prompt="a", max_tokens=20, logit_bias=endless)
        assert api.server.worker.unfinished_requests == 30  # the flood goes on
        for connection in connections:
            connection.close()
        api.until_idle()
    first = happened.index("other add")
    last = len(happened) - happened[::-1].index("other step")
    during = happened[first + 1 : last]
    assert during.count("other step") == 21  # the last one frees its pages
    assert 0 < during.count("flooded step") <= 21


def test_many_clients_get_their_own_answers(api: Api) -> None:
    """Each prompt has a nonce; the answer of each is what it is alone."""
    rng = random.Random(1)
    words = [f"{rng.randrange(10**6)} " * rng.randint(1, 6) for _ in range(60)]
    body = dict(model="text", max_tokens=8, temperature=0, echo=True)
    alone = {w: api.post("/v1/completions", **body, prompt=w)["choices"][0]["text"] for w in words}

    def ask(word: str) -> bool:
        response = api.client.post("/v1/completions", json=body | {"prompt": word})
        return response.json()["choices"][0]["text"] == alone[word]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, words * 3))
    api.until_idle()


def test_a_seed_is_independent_of_neighbours_without_one(api: Api) -> None:
    """Nor do requests mix that a client has given one id."""
    body = dict(model="text", prompt="once", max_tokens=30, temperature=1.3, logprobs=1)
    body["logit_bias"] = {"256": -100}  # they all have 30 tokens
    headers = {"X-Request-Id": "the same"}

    def ask(seed: int | None) -> dict:
        mine = body if seed is None else body | {"seed": seed}
        return api.client.post("/v1/completions", json=mine, headers=headers).json()

    alone = [ask(seed)["choices"] for seed in (7, 8)]
    with ThreadPoolExecutor(12) as pool:
        found = [*pool.map(ask, [7, None, None, 8, None, None] * 4)]
    assert [x["choices"] for x in found if x["choices"] in alone] == alone * 4
    free = [str(x["choices"]) for i, x in enumerate(found) if i % 3]
    assert len({*free}) == len(free)
    assert len({x["id"] for x in found}) == len(found)


def test_a_prompt_whose_reading_was_broken_off_is_found_in_the_cache(small: Api) -> None:
    body = long_request() | {"prompt": "a prompt " * 40, "stream": True}
    with small.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    small.until_idle()
    again = small.post("/v1/completions", **body | {"stream": False, "max_tokens": 1})
    assert again["usage"]["prompt_tokens"] == 360
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 320
    assert again["usage"]["completion_tokens"] <= 1


def test_a_slow_reader_does_not_slow_the_others(small: Api) -> None:
    """It reads nothing until all texts have ended, its own too; then it misses nothing."""
    import json

    body = long_request(logprobs=5, return_token_ids=True) | {"max_tokens": 800}
    body["logit_bias"] = dict.fromkeys(map(str, range(256, 262)), -100)
    small.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)  # of new connections
    narrow = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)])
    with httpx.Client(base_url=small.url, transport=narrow, timeout=60) as slow:
        ask = slow.build_request("POST", "/v1/completions", json=body | {"stream": True})
        response = slow.send(ask, stream=True)
        small.post("/v1/completions", model="chat", prompt="b", max_tokens=20)
        assert small.server.worker.unfinished_requests == 1
        small.until_idle()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert len(lines) < 700  # what it did not read in time came in one piece
    choices = [json.loads(line)["choices"][0] for line in lines]
    [whole] = small.post("/v1/completions", **body)["choices"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [i for choice in choices for i in choice["token_ids"]] == whole["token_ids"]
    scored = [x for choice in choices for x in choice["logprobs"]["token_logprobs"]]
    assert scored == whole["logprobs"]["token_logprobs"]


def test_an_error_in_the_engine_ends_its_texts_and_nothing_else(
    small: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small.server.models["chat"].engine
    step = engine.step

    def fail() -> None:
        monkeypatch.setattr(engine, "step", step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", fail)
    error = small.error("/v1/completions", 500, model="chat", prompt="a", max_tokens=3)
    assert error["message"] == "RuntimeError: out of memory"
    small.post("/v1/completions", model="chat", prompt="a", max_tokens=3)
    small.until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_tells_its_clients(
    tmp_path_factory: pytest.TempPathFactory, stream: bool
) -> None:
    """A text that is still unfinished when the time to drain is over ends with an error."""
    import json

    run = chat_run(tmp_path_factory.mktemp("stopped") / "chat", context_length=4096)
    with serving_models({"chat": served(run)}) as api:
        body = long_request(stream=stream, logit_bias=dict.fromkeys(map(str, range(256, 262)), -99))
        client = send(api, json.dumps(body).encode())
        while not api.server.worker.unfinished_requests:
            time.sleep(0.01)
    client.settimeout(20)
    received = b"".join(iter(lambda: client.recv(65536), b""))
    client.close()
    assert b"the server is shutting down" in received
    assert stream or received.startswith(b"HTTP/1.1 503 ")

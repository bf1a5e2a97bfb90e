"""Many clients at once, clients that leave, and a full queue."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
    assert small.server.worker.unfinished_texts == 0


def test_half_a_request_leaves_no_traceback(small: Api, caplog: pytest.LogCaptureFixture) -> None:
    send(small, b'{"prompt": "a"}', length=100).close()
    assert small.client.get("/health").is_success
    time.sleep(0.1)
    assert caplog.records == []


def test_a_full_queue_is_said_at_once(small: Api) -> None:
    import json

    body = json.dumps(long_request(n=6)).encode()
    connection = send(small, body)
    deadline = time.monotonic() + 20
    while small.server.worker.unfinished_texts < 6:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    started = time.monotonic()
    response = small.client.post("/v1/completions", json=long_request())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert time.monotonic() - started < 10
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    connection.close()
    small.until_idle()
    assert small.client.post("/v1/completions", json=long_request() | {"max_tokens": 1}).is_success


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


def test_a_slow_reader_does_not_slow_the_others(small: Api) -> None:
    import json

    slow = send(small, json.dumps(long_request(stream=True) | {"max_tokens": 2000}).encode())
    assert slow.recv(1)  # and nothing more
    done = threading.Event()

    def ask() -> None:
        small.post("/v1/completions", model="chat", prompt="b", max_tokens=20)
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert done.wait(30)
    thread.join()
    slow.close()
    small.until_idle()


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
        while not api.server.worker.unfinished_texts:
            time.sleep(0.01)
    client.settimeout(20)
    received = b"".join(iter(lambda: client.recv(65536), b""))
    client.close()
    assert b"the server is shutting down" in received
    assert stream or received.startswith(b"HTTP/1.1 503 ")

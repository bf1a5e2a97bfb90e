"""A judge behind real HTTP."""

import threading
from collections.abc import Callable, Iterator

import pytest
from judge_server import Reply, Server

from gptsmith.evaluate import endpoint


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, int], Reply]], Server]]:
    running: list[Server] = []

    def start(reply: Callable[[str, int], Reply]) -> Server:
        server = Server(reply)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are recorded instead of waited."""
    waited: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited

"""A judge behind real HTTP."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from judge_server import Reply, Server
from local_web import running

from gptsmith.evaluate import endpoint


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, int], Reply]], Server]]:
    with ExitStack() as servers:

        def start(reply: Callable[[str, int], Reply]) -> Server:
            server = Server(reply)
            servers.enter_context(running(server))
            return server

        yield start


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are recorded instead of waited."""
    waited: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited

"""HTTP/1.1 connections that a client cannot hold for nothing, and how the server ends them."""

from __future__ import annotations

import asyncio
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptsmith.serve.errors import ApiError
from gptsmith.serve.worker import Worker

REQUEST_SECONDS = 20  # for the headers of a request to arrive


class HttpServer(uvicorn.Server):
    """uvicorn's, which after a signal lets texts finish for `drain` seconds; what is unfinished
    then ends with an error that clients can read."""

    def __init__(self, config: uvicorn.Config, worker: Worker, drain: float) -> None:
        config.timeout_graceful_shutdown = int(drain) + 5  # for those errors to be sent
        super().__init__(config)
        self._worker, self._drain = worker, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        error = ApiError(503, "the server is shutting down", code="shutting_down")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain, self._worker.end_all, error)
        await super().shutdown(sockets)
        timer.cancel()


class Connection(H11Protocol):
    """uvicorn's, whose headers are limited in length, and here in time: it closes connections on
    which nothing comes, or a byte now and then. Bodies have their limits in access.py."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

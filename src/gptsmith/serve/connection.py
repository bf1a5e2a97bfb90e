"""HTTP/1.1 connections with time limits, their end when the server stops, and TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import NoReturn

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptsmith.serve.errors import ApiError
from gptsmith.serve.options import ServeOptions
from gptsmith.serve.worker import Worker

REQUEST_SECONDS = 20  # for the headers of a request to arrive
MAX_HEADER_BYTES = 64_000


def check_certificate(certificate: Path, key: Path) -> None:
    """ValueError for files that cannot be used for HTTPS: not PEM, a key of another certificate,
    or an encrypted key (a server that asks for a password would not start unattended)."""

    def reject() -> NoReturn:
        raise ValueError(
            f"--tls-key {key}: is encrypted: decrypt it with openssl pkey -in {key} -out NEW"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (certificate, key):
        path.open("rb").close()  # the errors of ssl do not name the file
    try:
        context.load_verify_locations(certificate)
    except ssl.SSLError:
        raise ValueError(f"--tls-cert {certificate}: has no certificate in PEM form") from None
    try:
        context.load_cert_chain(certificate, key, password=reject)
    except ssl.SSLError as error:
        other = error.reason == "KEY_VALUES_MISMATCH"
        problem = f"is not the key of {certificate}" if other else "has no private key in PEM form"
        raise ValueError(f"--tls-key {key}: {problem}") from None


class HttpServer(uvicorn.Server):
    """uvicorn's server. After a signal, requests have `drain` seconds to finish; those that have
    not then end with an error response."""

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


def http_server(app: Starlette, options: ServeOptions) -> HttpServer:
    """The HTTP server of an application that `create_app` made."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",  # what clients do wrong is told them, and does not fill the log
        access_log=False,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        server_header=False,
    )
    return HttpServer(config, app.state.server.worker, options.drain)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a time limit for headers, besides its limit of their size:
    a client cannot hold a connection by sending nothing, or a byte now and then. access.py limits
    bodies."""

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

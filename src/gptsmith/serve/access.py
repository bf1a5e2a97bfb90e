"""Access control. Requests from pages of other sites, for unknown host names (DNS rebinding), and
without the key are rejected before a route is chosen.

Plain ASGI middleware: it wraps `receive` to count bytes, so the application sees disconnects.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable, Sequence
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptsmith.serve.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
BODY_SECONDS = 60  # for a whole body to arrive
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
OPEN_PATHS = ("/", "/health")  # and the files of the page: what a browser needs to ask for the key
PAGE = "/page/"


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address to listen on."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one per line. ValueError if there is none."""
    keys = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {path}: has no key; write one per line")
    return keys


class Access:
    """ASGI middleware that passes a request on or rejects it with the reason.

    keys: without any, every client is accepted. hosts: accepted host names. origins: sites whose
    pages may use the server. The scope gets a "namespace" for the client's key: cached prefixes are
    shared within it only.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: Iterable[str],
        origins: Iterable[str],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._keys = [sha256(key.encode()).digest() for key in keys]
        self._hosts = {host.lower().strip("[]") for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no WebSockets
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response(scope, receive, guarded)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal received, complete
            if not complete:  # only where a body is read: other paths answer 404 or 405
                self._check_body(scope["method"], Headers(scope=scope))
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body took longer than {BODY_SECONDS} s") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited, guarded)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if (name := _hostname(f"//{host}")) not in self._hosts:
            raise ApiError(
                403, f"host {name!r} is not served here: start with --allow-host {name or 'NAME'}"
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in self._origins:
            own = f"{scope['scheme']}://{host}".lower()
            if origin.lower() != own:
                raise ApiError(
                    403, f"pages of {origin} may not use this server: see --allow-origin"
                )
        if scope["method"] == "OPTIONS":
            return  # a browser asks what is allowed before it sends the key
        path = scope["path"]
        if path not in OPEN_PATHS and not path.startswith(PAGE):
            scope["namespace"] = self._namespace(headers.get("authorization", ""))

    def _check_body(self, method: str, headers: Headers) -> None:
        if method != "POST":
            return  # whose body nobody reads
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, with the header Content-Type: application/json")
        if (coding := headers.get("content-encoding", "identity")).lower() != "identity":
            raise ApiError(415, f"Content-Encoding {coding} is not supported: send plain JSON")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body_bytes:
            raise self._too_large()

    def _namespace(self, authorization: str) -> str:
        if not self._keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        key = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        # Digests have one length, and all are compared: the time says nothing of the keys.
        digest = sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if not any(matches):
            message = "wrong API key" if key else "this server needs an API key"
            raise ApiError(
                401,
                f"{message}: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max_body_bytes:,} bytes")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

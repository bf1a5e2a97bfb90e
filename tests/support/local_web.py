"""HTTP servers on this machine for tests: real sockets, made-up contents."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """The other side may have hung up: it has seen enough."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(server: Server) -> Iterator[None]:
    """Answers requests within the context."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that runs within the context."""
    server = Server(("127.0.0.1", 0), handler)
    with running(server):
        yield server.url


@dataclass
class Site:
    """What a server has, and how it misbehaves."""

    files: dict[str, bytes]
    ranges: bool = True
    etag: str | None = '"one"'
    cuts: list[int] = field(default_factory=list)  # of coming answers: bytes before they break off
    statuses: list[int] = field(default_factory=list)  # of coming answers
    headers: dict[str, str] = field(default_factory=dict)
    too_long: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers["Range"]
        site.asked.append((self.path, wanted))
        if site.statuses and (status := site.statuses.pop(0)) != 200:
            return self.plain(status)
        content = site.files.get(self.path)
        if content is None:
            return self.plain(404)
        start = int(wanted[6:-1]) if wanted and site.ranges else 0
        if start >= len(content) > 0:
            return self.plain(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.etag:
            self.send_header("ETag", site.etag)
        for name, value in site.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + site.too_long))
        self.end_headers()
        cut = site.cuts.pop(0) if site.cuts else len(body)
        self.wfile.write(body[:cut])
        if cut < len(body) + site.too_long:
            self.close_connection = True
        return None

    def plain(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def site_of(files: dict[str, bytes]) -> Iterator[Site]:
    """A site with these files, by their path, that runs within the context."""
    site = Site(files)
    with serving(type("H", (Handler,), {"site": site})) as site.url:
        yield site

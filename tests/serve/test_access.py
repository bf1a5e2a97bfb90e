"""Who is let in."""

import contextlib
import gzip
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import Api, certificate, chat_run, served, serving_models

from gptsmith import cli
from gptsmith.serve import access, connection


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server with two API keys."""
    run = chat_run(tmp_path_factory.mktemp("locked") / "chat")
    with serving_models(
        {"chat": served(run)},
        keys=("first", "second"),
        allow_host=("chat.example.org",),
        allow_origin=("https://friend.example.org",),
        max_body_bytes=2000,
    ) as api:
        yield api


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/models/chat"])
def test_a_key_is_needed(locked: Api, path: str) -> None:
    assert locked.client.get(path).status_code == 401
    for value in ("Bearer third", "Bearer FIRST", "Bearer first x", "Bearer", "first"):
        response = locked.client.get(path, headers={"Authorization": value})
        assert response.status_code == 401, value
    response = locked.client.get(path, headers={"Authorization": "Basic first"})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        assert locked.client.get(path, headers=headers).status_code == 200


def test_keys_are_compared_in_constant_time(locked: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function made for it, with every key, as values of one length."""
    compared: list[tuple[bytes, bytes]] = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(access.hmac, "compare_digest", spy)
    for key, status in (("first", 200), ("f", 401), ("x" * 500, 401)):
        compared.clear()
        headers = {"Authorization": f"Bearer {key}"}
        assert locked.client.get("/v1/models", headers=headers).status_code == status
        assert [(len(a), len(b)) for a, b in compared] == [(32, 32), (32, 32)]


def test_prefixes_are_shared_within_a_key_only(locked: Api) -> None:
    """Else the time of an answer would tell what others have asked."""
    body = {"prompt": "a secret " * 10, "max_tokens": 1}

    def cached(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        found = locked.client.post("/v1/completions", json=body, headers=headers).json()
        return found["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("first"), cached("second")] == [0, 0]
    assert min(cached("first"), cached("second")) >= 64


@pytest.mark.parametrize(
    "path",
    ["/page/../v1/models", "/page/%2e%2e/v1/models", "/page/..%2fapp.py", "/page//../app.py"],
)
def test_no_path_leads_out_of_the_page(locked: Api, path: str) -> None:
    """As they are sent: clients would shorten them."""
    port = int(locked.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.recv(1000).split(maxsplit=2)[1] in (b"401", b"404")


def test_every_response_has_a_strict_content_security_policy(locked: Api) -> None:
    """And the page names no other server."""
    for path, status in (("/", 200), ("/page/app.js", 200), ("/v1/models", 401), ("/x", 401)):
        response = locked.client.get(path)
        assert response.status_code == status
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    for file in (Path(access.__file__).parent / "page").iterdir():
        assert not re.search(r"(src|href|url|import|from)[\s=(\"']+https?:", file.read_text())


def test_the_page_and_health_need_no_key(locked: Api) -> None:
    assert locked.client.get("/").status_code == 200
    assert locked.client.get("/health").status_code == 200
    assert locked.client.get("/page/index.html").status_code == 200
    assert locked.client.get("/page/../app.py").status_code in (401, 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("chat.example.org", 200),
        ("evil.example.org", 403),
        ("localhost.evil.org", 403),
        ("127.0.0.1.evil.org", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_foreign_host_names_are_rejected(locked: Api, host: str, status: int) -> None:
    assert locked.client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:{port}", 200),
        ("https://friend.example.org", 200),
        ("http://127.0.0.1", 403),
        ("https://127.0.0.1:{port}", 403),
        ("https://evil.example.org", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_sites_are_rejected(locked: Api, origin: str, status: int) -> None:
    port = locked.url.rpartition(":")[2]
    headers = {"Origin": origin.format(port=port), "Authorization": "Bearer first"}
    assert locked.client.get("/v1/models", headers=headers).status_code == status


def test_named_origins_get_cors_headers(locked: Api) -> None:
    asks = {"Origin": "https://friend.example.org", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    response = locked.client.options("/v1/chat/completions", headers=asks)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://friend.example.org"
    asks["Origin"] = "https://evil.example.org"
    response = locked.client.options("/v1/chat/completions", headers=asks)
    assert "access-control-allow-origin" not in response.headers


def test_posts_are_json(locked: Api) -> None:
    """A form, which a foreign page can send without asking first, is not accepted."""
    headers = {"Authorization": "Bearer first", "Content-Type": "text/plain"}
    response = locked.client.post("/v1/completions", content="{}", headers=headers)
    assert response.status_code == 415


def test_compressed_bodies_are_named(locked: Api) -> None:
    headers = {"Authorization": "Bearer first", "Content-Type": "application/json"}
    more = headers | {"Content-Encoding": "gzip"}
    response = locked.client.post("/tokenize", content=gzip.compress(b"{}"), headers=more)
    assert response.status_code == 415
    assert "Content-Encoding gzip" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10**6, b"\x16\x03\x01" * 9]
)
def test_what_is_no_request_is_400_and_no_line_of_the_log(
    locked: Api, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(locked.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent + b"\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert caplog.records == []


@pytest.mark.parametrize("chunked", [False, True])
def test_long_bodies_are_rejected(locked: Api, chunked: bool) -> None:
    headers = {"Authorization": "Bearer first", "Content-Type": "application/json"}
    body = b'{"prompt": "' + b"a" * 3000 + b'"}'
    content = iter([body[:1000], body[1000:]]) if chunked else body
    response = locked.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert "2,000 bytes" in response.json()["error"]["message"]


def test_a_body_that_never_ends_is_given_up(locked: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    port = int(locked.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(head.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhos"]
)
def test_a_connection_without_a_request_is_closed(
    locked: Api, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Also one that has been answered before, and sends the next request byte by byte."""
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.2)
    port = int(locked.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        if sent:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in client.recv(10_000)
        with contextlib.suppress(ConnectionError):
            for byte in sent:
                client.sendall(bytes([byte]))
                time.sleep(0.02)
            while data := client.recv(10_000):
                assert b"HTTP/1.1" not in data  # the rest of the first answer


def test_an_address_that_others_reach_needs_a_key(
    user_error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTSMITH_API_KEY", raising=False)
    error = user_error("serve", tmp_path, "--host", "0.0.0.0")
    assert "can be reached from other machines: set an API key" in error
    (tmp_path / "keys").write_text("# nobody\n\n")
    error = user_error("serve", tmp_path, "--api-key-file", tmp_path / "keys")
    assert "has no key" in error
    error = user_error("serve", tmp_path, "--tls-cert", tmp_path / "keys")
    assert "belong together" in error
    assert cli.main(["serve", "--help"]) == 0


def test_unusable_certificates_are_one_line(user_error, tmp_path: Path) -> None:
    def error(cert: Path, key: Path) -> str:
        return user_error("serve", tmp_path, "--tls-cert", cert, "--tls-key", key)

    (cert, key), (_, other) = certificate(tmp_path), certificate(tmp_path, "other")
    text, locked = tmp_path / "text", tmp_path / "locked.key"
    text.write_text("no PEM")
    protect = ["openssl", "pkey", "-in", key, "-out", locked, "-aes256", "-passout", "pass:x"]
    subprocess.run(protect, check=True)
    assert f"{tmp_path / 'none'}" in error(tmp_path / "none", key)
    assert f"{tmp_path / 'none'}" in error(cert, tmp_path / "none")
    assert f"--tls-cert {text}: has no certificate" in error(text, key)
    assert f"--tls-key {text}: has no private key" in error(cert, text)
    assert f"--tls-key {other}: is not the key of {cert}" in error(cert, other)
    assert f"--tls-key {locked}: is encrypted" in error(cert, locked)


def test_an_occupied_port_is_one_line(user_error, locked: Api, tmp_path: Path) -> None:
    port = locked.url.rpartition(":")[2]
    assert "try another --port" in user_error("serve", tmp_path, "--port", port)


def test_an_address_of_another_machine_is_one_line(user_error, tmp_path: Path) -> None:
    words = ("--host", "192.0.2.1", "--api-key", "key")  # RFC 5737: nobody's
    assert "try another --host" in user_error("serve", tmp_path, *words)

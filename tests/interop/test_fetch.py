"""Downloads, from real HTTP servers on this machine; the Hub's own client, from a small Hub."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptsmith import files
from gptsmith.interop import fetch, hub
from gptsmith.interop.fetch import Wanted
from gptsmith.model.config import ModelConfig
from gptsmith.model.size import parameters

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = Wanted("weights", len(CONTENT), SHA256)


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


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """The other side may have hung up: it has seen enough."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that runs within the context."""
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch, "_PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "*")
    site = Site({"/weights": CONTENT})
    with serving(type("H", (Handler,), {"site": site})) as site.url:
        yield site


def get(site: Site, folder: Path, wanted: Wanted = FILE) -> bytes:
    path = folder / "weights"
    fetch.fetch(f"{site.url}/weights", path, wanted, lambda *_: None)
    assert [child.name for child in folder.iterdir()] == ["weights"]
    return path.read_bytes()


def starts(site: Site) -> list[int]:
    """From which byte on each request asked."""
    return [int(wanted[6:-1]) if wanted else 0 for _, wanted in site.asked]


def break_off(site: Site, folder: Path) -> None:
    """Leave a part behind, as a killed or disconnected process would."""
    site.cuts[:] = [200_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="gave up after 4 tries"):
        get(site, folder)
    assert [child.suffix for child in folder.iterdir()] == [".part"]
    site.asked.clear()
    site.cuts.clear()


def test_a_file(site: Site, tmp_path: Path) -> None:
    progress = []
    path = tmp_path / "weights"
    fetch.fetch(f"{site.url}/weights", path, FILE, lambda *how_far: progress.append(how_far))
    assert path.read_bytes() == CONTENT
    assert progress[-1] == ("weights", len(CONTENT), len(CONTENT))
    assert starts(site) == [0]


def test_a_broken_connection_is_taken_up_again(site: Site, tmp_path: Path) -> None:
    """More often than there are pauses, as long as it comes further each time."""
    site.cuts[:] = [50_000] * 8
    assert get(site, tmp_path) == CONTENT
    assert len(site.asked) > 8
    assert starts(site) == sorted(starts(site))
    assert starts(site)[-1] > 300_000


def test_the_next_call_goes_on(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    assert get(site, tmp_path) == CONTENT
    assert starts(site)[0] > 100_000


def test_a_complete_part_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    next(tmp_path.iterdir()).write_bytes(CONTENT)
    assert get(site, tmp_path) == CONTENT
    assert starts(site) == [len(CONTENT) - 1]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("shorter", [False, True])
def test_a_file_that_changed_between_is_begun_anew(
    site: Site, tmp_path: Path, shorter: bool, ranges: bool
) -> None:
    break_off(site, tmp_path)
    site.ranges = ranges
    changed = CONTENT[::-1][: 10_000 if shorter else None]
    site.files["/weights"], site.etag = changed, '"two"'
    assert get(site, tmp_path, Wanted("weights")) == changed


def test_a_server_without_ranges(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    site.ranges = False
    assert get(site, tmp_path) == CONTENT


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_a_server_that_names_no_version(site: Site, tmp_path: Path, etag: str | None) -> None:
    """Nothing says that the rest belongs to the part, so all is fetched."""
    site.etag = etag
    site.cuts[:] = [200_000]
    assert get(site, tmp_path) == CONTENT
    assert starts(site) == [0, 0]


def test_errors_of_the_server(site: Site, tmp_path: Path) -> None:
    break_off(site, tmp_path)
    site.statuses[:] = [503, 429]
    assert get(site, tmp_path) == CONTENT  # and its part was kept
    assert min(starts(site)) > 100_000
    (tmp_path / "weights").unlink()
    site.asked.clear()
    del site.files["/weights"]
    with pytest.raises(ConnectionError, match="answers 404 Not Found"):
        get(site, tmp_path)
    assert len(site.asked) == 1


def test_another_size_than_was_published(site: Site, tmp_path: Path) -> None:
    site.files["/weights"] = CONTENT + b"more"
    with pytest.raises(ValueError, match="has 512004 bytes, expected 512000"):
        get(site, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_promise_of_more_than_comes(site: Site, tmp_path: Path) -> None:
    site.too_long = 5
    with pytest.raises(ConnectionError, match="gave up after 4 tries"):
        get(site, tmp_path, Wanted("weights"))
    assert not (tmp_path / "weights").exists()


def test_another_content_than_was_published(site: Site, tmp_path: Path) -> None:
    site.files["/weights"] = CONTENT[::-1]
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{16}\.\.\. instead of"):
        get(site, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("header", ["Content-MD5", "x-ms-blob-content-md5"])
def test_the_servers_own_md5(site: Site, tmp_path: Path, header: str) -> None:
    unpublished = Wanted("weights")
    site.headers[header] = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    assert get(site, tmp_path, unpublished) == CONTENT
    (tmp_path / "weights").unlink()
    site.files["/weights"] = CONTENT[::-1]
    with pytest.raises(ValueError, match="MD5 that it announced"):
        get(site, tmp_path, unpublished)
    assert not list(tmp_path.iterdir())


# --- OpenAI's files ------------------------------------------------------------------------------


@pytest.fixture
def openai(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A server with a small "124M"; its folder in the cache."""
    texts = {"hparams.json": b"{}", "model.ckpt.index": b"index", "weights": CONTENT}
    site.files = {f"/models/124M/{name}": content for name, content in texts.items()}
    wanted = [
        Wanted(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in texts.items()
    ]
    monkeypatch.setattr(fetch, "_OPENAI", f"{site.url}/models")
    monkeypatch.setattr(fetch, "GPT2", {"124M": tuple(wanted)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gptsmith" / "gpt2" / "124M"


def test_a_whole_model(site: Site, openai: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.gpt2("124M") == openai
    assert (openai / "weights").read_bytes() == CONTENT
    assert "fetching weights: 0.5 of 0.5 MB" in re.sub(r"0\.[0-4]", "0.5", capsys.readouterr().err)
    site.asked.clear()
    assert fetch.gpt2("124M") == openai
    assert not site.asked


def test_files_that_were_put_there_are_verified_and_used(site: Site, openai: Path) -> None:
    openai.mkdir(parents=True)
    (openai / "weights").write_bytes(CONTENT)
    fetch.gpt2("124M")
    assert [path for path, _ in site.asked] == [
        "/models/124M/hparams.json",
        "/models/124M/model.ckpt.index",
    ]
    (openai / "weights").write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match="has 511,999 bytes instead of 512,000: delete it"):
        fetch.gpt2("124M")
    (openai / "weights").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=r"sha256.* delete it and run this again"):
        fetch.gpt2("124M")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_without_network(
    openai: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "_PAUSES", (60.0,))  # which it does not wait for
    monkeypatch.setattr(fetch, "_OPENAI", f"http://127.0.0.1:{free_port()}/models")
    openai.mkdir(parents=True)
    (openai / "hparams.json").write_bytes(b"{}")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        fetch.gpt2("124M")
    assert time.monotonic() - began < 5
    assert f"put model.ckpt.index, weights of {fetch._OPENAI}/124M into {openai}" in str(
        error.value
    )
    assert "refused" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_process_at_a_time(openai: Path) -> None:
    openai.mkdir(parents=True)
    with files.lock(openai, ""), pytest.raises(ValueError, match="is in use by another process"):
        fetch.gpt2("124M")


def test_what_is_known_of_openais_files(real_data: Path) -> None:
    """The BPE tables are at hand; the data files are four bytes per parameter."""
    for size, preset in (("124M", "gpt2"), ("355M", "gpt2-medium")):
        known = {wanted.name: wanted for wanted in fetch.GPT2[size]}
        for name in ("encoder.json", "vocab.bpe"):
            fetch.verify(real_data / "gpt2_bpe" / name, known[name], "")
        expected = 4 * parameters(ModelConfig.preset(preset))
        assert known["model.ckpt.data-00000-of-00001"].size == expected


# --- the Hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as its client asks for."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    lies: dict[str, bytes]  # what is sent instead
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/smith/small"):
            siblings = []
            for name, content in self.files.items():
                one: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
                if name.endswith(".safetensors"):
                    sha256 = hashlib.sha256(content).hexdigest()
                    one["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
                siblings.append(one)
            body = {"id": "smith/small", "sha": COMMIT, "siblings": siblings}
            return self.send(json.dumps(body).encode(), "application/json", {})
        found = re.fullmatch(r"/smith/small/resolve/([^/]+)/(.+)", self.path)
        if not found or found[2] not in self.files:
            return self.send(b"{}", "application/json", {"X-Error-Code": "RepoNotFound"}, 404)
        content = self.lies.get(found[2], self.files[found[2]])
        etag = hashlib.sha256(self.files[found[2]]).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        return self.send(content, "application/octet-stream", headers)

    def send(self, body: bytes, kind: str, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


SCRIPT = """
import sys, json
from gptsmith.interop import hub
for name in sys.argv[1:]:
    try:
        folder, revision, notes = hub.fetch(name)
        print(json.dumps([sorted(p.name for p in folder.iterdir()), revision, notes]))
    except (ValueError, FileNotFoundError) as error:
        print(json.dumps(str(error)))
"""


def through_the_hub(url: str, cache: Path, *names: str, **more: str) -> list[Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "NO_PROXY": "*", **more}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub(tmp_path: Path) -> None:
    good = {
        "config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "chat_template.jinja": b"{{ messages }}",
        "model-00001-of-00002.safetensors": CONTENT,
        "model-00002-of-00002.safetensors": CONTENT[::-1],
        "model.safetensors.index.json": b"{}",
        "modeling_small.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "README.md": b"...",
    }
    needed = sorted(name for name in good if not name.endswith((".py", ".bin", ".onnx", ".md")))
    handler = type("H", (Hub,), {"files": good, "lies": {}, "asked": []})
    with serving(handler) as url:
        first, absent = through_the_hub(url, tmp_path / "a", "smith/small", "smith/none")
        assert first == [needed, COMMIT, []]
        assert "smith/none is no folder here, nor to be had from the Hub" in absent
        assert not any(name in " ".join(handler.asked) for name in (".py", ".bin", ".onnx", ".md"))

        handler.lies["model-00001-of-00002.safetensors"] = CONTENT[::-1]
        [lie] = through_the_hub(url, tmp_path / "b", "smith/small")
        assert "model-00001-of-00002.safetensors has sha256" in lie
        handler.lies.clear()
        assert through_the_hub(url, tmp_path / "b", "smith/small") == [first]

        for name in list(good):
            if name.endswith(".safetensors"):
                del good[name]
        [pickled] = through_the_hub(url, tmp_path / "c", "smith/small")
        assert "pickled weights are not opened" in pickled

    began = time.monotonic()
    cached, fresh = through_the_hub(url, tmp_path / "a", "smith/small", "smith/none")
    assert cached[:2] == [needed, COMMIT]
    assert "taken as it was when it was fetched" in cached[2][0]
    assert "put its config.json, tokenizer.json" in fresh
    assert time.monotonic() - began < 20
    [offline] = through_the_hub(url, tmp_path / "a", "smith/small", HF_HUB_OFFLINE="1")
    assert offline == cached


def test_without_the_hubs_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'gptsmith\[hub\]'.*put its config\.json"):
        hub.fetch("smith/small")

"""Models of the Hub, from a small Hub on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from local_web import serving

from gptsmith.interop import hub

CONTENT = bytes(range(256)) * 2000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What the client needs of the Hub."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.path.startswith(f"/api/models/smith/small/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in self.files.items()
            ]
            return self.send(json.dumps(tree).encode(), "application/json", {})
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
        content = self.files[found[2]]
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


def test_download_from_the_hub(tmp_path: Path) -> None:
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
    handler = type("H", (Hub,), {"files": good, "asked": []})
    with serving(handler) as url:
        first, absent = through_the_hub(url, tmp_path / "a", "smith/small", "smith/none")
        assert first == [needed, COMMIT, []]
        assert "smith/none is not a local folder, nor available from the Hub" in absent
        assert not any(name in " ".join(handler.asked) for name in (".py", ".bin", ".onnx", ".md"))

        for name in list(good):
            if "safetensors" in name:
                del good[name]
        [pickled] = through_the_hub(url, tmp_path / "c", "smith/small")
        assert "pickled weights are not opened" in pickled

    began = time.monotonic()
    cached, fresh = through_the_hub(url, tmp_path / "a", "smith/small", "smith/none")
    assert cached[:2] == [needed, COMMIT]
    assert "the Hub is unreachable: using the cached" in cached[2][0]
    assert "put its config.json, tokenizer.json" in fresh
    assert time.monotonic() - began < 20
    [offline] = through_the_hub(url, tmp_path / "a", "smith/small", HF_HUB_OFFLINE="1")
    assert offline == cached


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'gptsmith\[hub\]'.*put its config\.json"):
        hub.fetch("smith/small")

"""The real HTTP server in a thread of the test's process, with models of random weights."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from runs import random_run

from gptsmith.chat_template.template import tuning_template
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run
from gptsmith.serve.app import create_app
from gptsmith.serve.connection import http_server
from gptsmith.serve.options import ServeOptions
from gptsmith.serve.served import ServedModel
from gptsmith.tokenizer import Tokenizer


def chat_run(path: Path, seed: int = 1, **axes: Any) -> Run:
    """A chat model of bytes that says random things."""
    template = tuning_template(Tokenizer.byte(), None)
    tokenizer = template.tokenizer
    size = dict(n_layer=2, n_head=2, n_embd=32, context_length=256)
    config = ModelConfig(**{**size, **axes}, vocab_size=tokenizer.vocab_size)
    return random_run(path, config, tokenizer, template.source, seed=seed)


def served(run: Run, name: str = "chat", max_batch_size: int = 8) -> ServedModel:
    return ServedModel(name, run, run.load_model("last", "cpu"), max_batch_size)


def certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its private key. Skips without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-out", str(cert), "-keyout", str(key)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return cert, key


class Api:
    """A client of the server. certificate: the only one that it trusts. folder: where the runs
    are, for who wants to read them. listening: the server's socket."""

    def __init__(self, url: str, server: Any, certificate: Path | None = None) -> None:
        self.url, self.server = url, server
        self.folder = Path()
        self.listening: socket.socket
        trust = True if certificate is None else ssl.create_default_context(cafile=certificate)
        self.client = httpx.Client(base_url=url, timeout=60, verify=trust)

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of a successful answer."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        """The error of a rejected request, which has all fields of OpenAI's."""
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return error

    def until_idle(self) -> None:
        """Wait until nothing is generated and nothing waits."""
        deadline = time.monotonic() + 30
        worker = self.server.worker
        while worker.unfinished_requests or any(engine.busy for engine in worker.engines):
            assert time.monotonic() < deadline
            time.sleep(0.005)


@contextmanager
def serving_models(
    models: Mapping[str, ServedModel], keys: Sequence[str] = (), **options: Any
) -> Iterator[Api]:
    """The server of these models, on a free port."""
    chosen = ServeOptions(run=(Path(),), **{"drain": 0.3, **options})
    app = create_app(models, chosen, keys)
    server = http_server(app, chosen)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        scheme = "http" if chosen.tls_cert is None else "https"
        url = f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
        api = Api(url, app.state.server, chosen.tls_cert)
        api.listening = listening
        try:
            with api.client:
                yield api
        finally:
            server.should_exit = True
            thread.join()

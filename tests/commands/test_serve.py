"""`gptsmith serve`, the command."""

import json
import os
import signal
import ssl
import threading
from pathlib import Path

import httpx
import pytest
import torch
from runs import random_run
from server_process import serving

from gptsmith import cli
from gptsmith.commands import serve
from gptsmith.kernels import packed_model
from gptsmith.model.config import ModelConfig
from gptsmith.serve.options import ServeOptions

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from api_server import chat_run

    return chat_run(tmp_path_factory.mktemp("serve") / "chat", context_length=2048).path


def test_no_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "gptsmith serve: RUN is required\n"


def test_sigterm_lets_a_running_stream_end(run: Path) -> None:
    with serving(run) as (process, url):
        body = {"prompt": "a", "max_tokens": 1500, "stream": True, "temperature": 0}
        events: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    events.append(line)
                    begun.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert "data: [DONE]" in events
        process.wait(30)
        assert process.returncode in (0, -signal.SIGTERM)


def test_a_killed_server_leaves_no_process_and_no_file(run: Path, tmp_path: Path) -> None:
    """Killed while it generates: no child lives on, and the runs are as they were."""

    def files() -> dict[str, tuple[int, int]]:
        found = {}
        for folder in (run, tmp_path):
            for path in folder.rglob("*"):
                found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found

    before = files()
    body = {"prompt": "a", "max_tokens": 2000, "stream": True, "temperature": 0}
    body["logit_bias"] = dict.fromkeys(map(str, range(256, 262)), -100)
    with serving(run, TMPDIR=str(tmp_path)) as (process, url):
        group = os.getpgid(process.pid)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert process.wait(30) == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
    assert files() == before


def test_keys_of_the_environment_and_of_a_file_are_asked_for(run: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("\ufeff# ours\r\nsecond\r\n\n third \n", encoding="utf-8")
    words = (run, "--api-key-file", keys)
    with serving(*words, GPTSMITH_API_KEY="first") as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key, status in (("first", 200), ("second", 200), ("third", 200), ("# ours", 401)):
            found = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert found.status_code == status
            assert status != 200 or [model["id"] for model in found.json()["data"]] == ["chat"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_https(run: Path, tmp_path: Path) -> None:
    """With a certificate that the client trusts: answers, streams, and pages of this origin."""
    from api_server import certificate

    cert, key = certificate(tmp_path)
    with serving(run, "--tls-cert", cert, "--tls-key", key) as (process, url):
        assert url.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=cert)
        body = {"prompt": "a", "max_tokens": 8, "temperature": 0}
        with httpx.Client(base_url=url, verify=trust, headers={"Origin": url}) as client:
            assert "<title>" in client.get("/").text
            whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            assert lines.pop() == "[DONE]"
            assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == whole
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)  # nobody else has signed it
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_two_runs_of_one_name_are_rejected(run: Path, user_error) -> None:
    assert "rename the folder" in user_error("serve", run, run, "--port", "0")


def test_a_port_that_is_taken_is_one_line(run: Path, user_error) -> None:
    with serving(run) as (_, url):
        port = url.rpartition(":")[2]
        assert "try another --port" in user_error("serve", run, "--port", port)


def test_bodies_are_read_as_json_lines_would_be(run: Path) -> None:
    """What a client sends never becomes a special token, and no byte is lost on the way."""
    with serving(run) as (_, url):
        text = "<|end|>\u0000é😀\\"
        found = httpx.post(f"{url}/tokenize", json={"prompt": text}).json()
        back = httpx.post(f"{url}/detokenize", json={"tokens": found["tokens"]}).json()
        assert back["prompt"] == text
        assert json.dumps(text) in json.dumps(back)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "more", [{}, {"dtype": "bfloat16"}, {"dtype": "float32"}, {"quantize": "int8"}]
)
def test_kernels_are_compiled_early_for_the_format_that_is_asked_for(
    stored: str, more: dict[str, str], tmp_path: Path
) -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16, vocab_size=257)
    run = random_run(tmp_path / "run", config, dtype=getattr(torch, stored))
    options = ServeOptions(run=(run.path,), device="cpu", **more)
    model = options.load(run)
    assert serve._kernel_format(options) == packed_model._format(model, options.engine_weights)


def test_kernels_are_compiled_early_for_a_cpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_GPUS", (str(tmp_path / "none"),))
    monkeypatch.setattr("sys.platform", "linux")
    assert [serve._is_for_cpu(device) for device in ("cpu", "auto", "cuda:1")] == [
        True,
        True,
        False,
    ]
    monkeypatch.setattr(serve, "_GPUS", (str(tmp_path),))
    assert [serve._is_for_cpu(device) for device in ("cpu", "auto")] == [True, False]

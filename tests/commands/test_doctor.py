"""`gptsmith doctor`: each check finds what is there, and says what to do about what is not."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from gptsmith import cli, files
from gptsmith.inspect import installation, machine
from gptsmith.inspect.check import Check
from gptsmith.kernels import build
from gptsmith.train import runtime

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def by_name(checks) -> dict[str, Check]:
    return {check.name: check for check in checks}


def doctor(*flags: str, **variables: str) -> dict[str, Check]:
    done = subprocess.run(
        [sys.executable, "-m", "gptsmith", "doctor", "--format", "json", *flags],
        env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return by_name(Check(**found) for found in json.loads(done.stdout))


def test_command_reports_this_machine_and_leaves_nothing_behind(tmp_path, capsys):
    assert cli.main(["doctor", "--folder", str(tmp_path / "runs" / "new")]) == 0
    said = capsys.readouterr().out
    for name in ("Python", "PyTorch", "CPU", "memory", "C compiler", "torch.compile", "disk",
                 "files", "training", "extra hub"):  # fmt: skip
        assert f"│ {name} " in said
    assert "problems: " in said
    assert torch.__version__ in said
    assert list(tmp_path.iterdir()) == []


def test_machine_without_compilers_gets_a_remedy(tmp_path):
    found = doctor("--folder", str(tmp_path), PATH=str(tmp_path), CC="")
    for name in ("C compiler", "torch.compile"):
        assert found[name].state == "missing"
        assert "apt install g++" in found[name].remedy
    assert found["files"].state == "ok"


def test_compiler_that_fails_is_a_problem(tmp_path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'answer.cpp:2: fatal error: Python.h: none' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = machine._compile()
    assert found.state == "problem"
    assert "Python.h" in found.found
    assert "python3-dev" in found.remedy

    def fail(*_):
        raise build.BuildError("cc failed: no space left")

    monkeypatch.setattr("gptsmith.kernels.native.load", fail)
    assert machine._kernels().found.endswith("cc failed: no space left")


@pytest.mark.skipif(not build.variants()[0].needs, reason="this CPU has no kernels of its own")
def test_compilers_of_this_machine_are_really_used(tmp_path, monkeypatch):
    """With an empty cache: nothing is found there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine._kernels().state == machine._compile().state == "ok"
    assert list(tmp_path.rglob("*.so"))


def test_disk_that_cannot_keep_files_is_a_problem(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert by_name(installation.file_checks(tmp_path))["files"].state == "ok"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        found = by_name(installation.file_checks(tmp_path))["files"]
    assert (found.state, "Input/output error" in found.found) == ("problem", True)
    for lock in (
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")),
        lambda *_: pytest.MonkeyPatch.context(),
    ):  # raises, or lets everyone in
        with monkeypatch.context() as patched:
            patched.setattr(files, "lock", lock)
            found = by_name(installation.file_checks(tmp_path))["files"]
        assert (found.state, "flock" in found.found) == ("problem", True)
    assert list(tmp_path.iterdir()) == []


def test_time_of_fewer_cores_than_threads_is_a_problem(monkeypatch):
    monkeypatch.setattr(runtime, "cpu_quota", lambda: None)
    assert machine._cpu().state == "ok"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(runtime, "cpu_quota", lambda: 2.5)
    found = machine._cpu()
    assert found.state == "problem"
    assert "time of 2.5 cores" in found.found
    assert "OMP_NUM_THREADS=2" in found.remedy


def test_limit_of_memory_is_named(monkeypatch):
    monkeypatch.setattr(runtime, "memory_bytes", lambda device: 2**30)
    assert "1.0 GiB: the limit of a container" in machine._memory().found


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here")
@pytest.mark.parametrize("build", [None, "13.0"])
def test_gpu_that_pytorch_cannot_use_is_a_problem(build, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "nvidiactl")
    assert [check.state for check in machine._gpus()] == ["missing"]
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(torch.version, "cuda", build)
    [found] = machine._gpus()
    assert found.state == "problem"
    assert ("driver" if build else "CUDA builds") in found.remedy


def test_gpu_that_fails_is_a_problem_beside_the_others(monkeypatch):
    def memory(device):
        if device.index == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 2**33, 2**34

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = [*machine._gpus()]
    assert [check.state for check in found] == ["ok", "problem", "ok"]
    assert "cannot be used: CUDA out of memory" in found[1].found
    assert "8.0 of 16.0 GiB free, trains in bf16 and fp8" in found[2].found


@pytest.mark.parametrize(
    ("part", "function", "name"),
    [
        (machine, "_torch", "PyTorch"),
        (machine, "_cpu", "CPU"),
        (machine, "_bf16", "bfloat16"),
        (machine, "_memory", "memory"),
        (machine, "_gpus", "GPU"),
        (machine, "_training", "training"),
        (machine, "_kernels", "C compiler"),
        (machine, "_compile", "torch.compile"),
        (installation, "python_checks", "Python"),
        (installation, "file_checks", "files"),
        (installation, "data_checks", "GPTSMITH_DATA"),
        (installation, "extra_checks", "extras"),
    ],
)
def test_no_check_ends_the_report(part, function, name, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("this is broken\nin two lines")

    for other in ("_kernels", "_compile"):  # they compile
        monkeypatch.setattr(machine, other, lambda: Check("quick", "ok", "not tried"))
    monkeypatch.setattr(part, function, fail)
    assert cli.main(["doctor", "--folder", str(tmp_path), "--format", "json"]) == 0
    found = by_name(Check(**check) for check in json.loads(capsys.readouterr().out))
    assert found[name] == (name, "problem", "RuntimeError: this is broken", "")
    assert len(found) > 8


def test_the_compiler_that_is_chosen_by_cxx_is_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    found = machine._compile()
    assert (found.state, found.remedy) == ("missing", "unset CXX")
    assert f"{tmp_path / 'none'}' (CXX)" in found.found


def test_every_extra_of_the_project_is_checked(monkeypatch):
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(installation.EXTRAS) | {"dev", "docs"} == set(extras)  # the two of developers
    lines = [f'{line}; extra == "{extra}"' for extra in extras for line in extras[extra]]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch>=2.11", *lines])
    assert installation.required_by_extras()["track"] == [
        "tensorboard",
        "wandb",
        "mlflow",
        "trackio",
    ]
    monkeypatch.setattr(installation, "_version", {"gguf": "0.19"}.get)
    found = by_name(installation.extra_checks())
    assert found["extra gguf"].state == "ok"
    assert found["extra serve"].remedy == "pip install 'gptsmith[serve]'"
    assert "starlette" in found["extra serve"].found


def test_data_folder_that_is_missing_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    assert not list(installation.data_checks())
    for folder, state in ((tmp_path, "ok"), (tmp_path / "gone", "problem")):
        monkeypatch.setenv("GPTSMITH_DATA", str(folder))
        assert [check.state for check in installation.data_checks()] == [state]


def test_hub_is_asked_only_on_request(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert installation.hub_check().state == "ok"
        server.shutdown()
    assert asked == ["/"]
    found = installation.hub_check()
    assert found.state == "missing"
    assert "GPTSMITH_DATA" in found.remedy

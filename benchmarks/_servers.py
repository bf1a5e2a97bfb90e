"""The servers that `serve` compares, each with the same weights, two or more cores and a cache of
CACHE_TOKENS: how they are started, and what is missing where one cannot be."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks._contestant import ROOT, ProcessGroup, imports, vllm_environment
from benchmarks._load import first_answer

CACHE_TOKENS = 16384  # 32 texts of up to 512 tokens
LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or ""
VLLM_PYTHON = os.environ.get("VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
TRANSFORMERS_PYTHON = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
START = 600.0  # seconds


class Files(NamedTuple):
    """The same weights in each server's form."""

    run: Path
    hf: Path
    gguf: Mapping[str, Path]
    packed: Mapping[str, int]
    """Bytes of our packed weights."""
    cache_bytes: int
    """Of CACHE_TOKENS in 16 bits."""


class Command(NamedTuple):
    """How to start a server: its words for a port, and what differs in the environment."""

    words: Callable[[int], list[str]]
    model: str
    """Its name in requests."""
    environment: dict[str, str]
    weight_bytes: int
    """What is read for each token of one text."""


class Server(ProcessGroup):
    """A server that has answered once."""

    def __init__(self, command: Command) -> None:
        port = free_port()
        self.url, self.model = f"http://127.0.0.1:{port}", command.model
        begin = time.perf_counter()
        super().__init__(command.words(port), command.environment)
        try:
            with self.turn():
                while not first_answer(self.url, self.model):
                    self.check()
                    if time.perf_counter() - begin > START:
                        raise RuntimeError(f"no answer in {START:.0f} s: {command.words(port)}")
                    time.sleep(0.02)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def gptsmith(run: Path, weight_bytes: int = 0, *more: str) -> Command:
    return Command(
        lambda port: [
            *(sys.executable, "-m", "gptsmith", "serve", str(run), "--port", str(port)),
            *more,
        ],
        run.name,
        {},
        weight_bytes,
    )


def llama_server(path: Path) -> Command | str:
    """Or what is missing."""
    if not LLAMA_SERVER:
        return "llama-server is not on the PATH: LLAMA_SERVER names it"
    threads = str(torch.get_num_threads())
    return Command(
        lambda port: [
            *(LLAMA_SERVER, "--model", str(path), "--host", "127.0.0.1", "--port", str(port)),
            *("--threads", threads, "--threads-batch", threads, "--no-webui"),
            *("--parallel", "32", "--kv-unified", "--ctx-size", str(CACHE_TOKENS)),
        ],
        path.stem,
        {},
        path.stat().st_size,
    )


def vllm(files: Files) -> Command | str:
    """Or what is missing."""
    if not imports(VLLM_PYTHON, "vllm"):
        return f"no vLLM in {VLLM_PYTHON} (make test-vllm): VLLM_PYTHON names another"
    return Command(
        lambda port: [
            *(VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(files.hf)),
            *("--served-model-name", "hf", "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--max-num-seqs", "32"),
            *("--kv-cache-memory-bytes", str(files.cache_bytes)),
        ],
        "hf",
        vllm_environment(VLLM_PYTHON),
        weights_of(files.hf),
    )


def transformers(files: Files) -> Command | str:
    """Or what is missing."""
    if not imports(TRANSFORMERS_PYTHON, "transformers", "fastapi", "uvicorn", "openai"):
        return (
            f"no transformers with fastapi, uvicorn and openai in {TRANSFORMERS_PYTHON}: "
            "TRANSFORMERS_PYTHON names another"
        )
    return Command(
        lambda port: [
            *(TRANSFORMERS_PYTHON, "-m", "transformers.cli.transformers", "serve"),
            *(str(files.hf), "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--device", "cpu", "--continuous-batching"),
            *(
                "--cb-num-blocks",
                str(CACHE_TOKENS // 256),
            ),  # of 256 tokens; else most of the memory
        ],
        str(files.hf),
        {"HF_HUB_OFFLINE": "1"},
        weights_of(files.hf),
    )


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

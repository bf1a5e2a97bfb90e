"""Tokens per second on a CPU, compared with llama.cpp, vLLM and the memory; or on a GPU.

    python -m benchmarks decode [--rounds 5] [--tokens 64] [--prompt 512] [--weights int8,...]
    python -m benchmarks decode --device cuda [--rounds 3] [--tokens 64] [--prompt 512]

A model of GPT-2's size with random weights, packed by us and exported for the others. Rows are
decoded greedily behind a short prompt; a step of ours is vectors, logits and the choice of a token,
one of llama.cpp llama_decode and the same choice, one of vLLM a step of its engine. Each contestant
has its own process, so that no two OpenMP runtimes meet, and they alternate: medians over the
rounds. Beside them the share of what the memory gives in the same rounds.

LLAMA_PYTHON and VLLM_PYTHON name the Pythons that have llama-cpp-python and vLLM, if not this one
and .venv-vllm. llama-cpp-python for figures is `pip install --no-cache-dir llama-cpp-python`: what
`make test-gguf` installs is compiled quickly and runs slowly.

With --device, whole steps of our engine on that device: 1 to 256 greedy rows behind prompts of
--prompt tokens, by captured graphs and by launched operations; see _decode_device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks import _decode_device
from benchmarks._contestant import ROOT, Contestant, closing_all, imports, vllm_environment
from benchmarks._machine import read_bytes

from gptsmith.interop.external_model import ExportableModel
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

# A round's seconds per token: one row, 8 rows, 32 rows, a prompt.
Rounds = list[list[float]]
PAIRS = {"bfloat16": "f16", "int8": "q8_0", "int4": "q4_0"}  # ours and llama.cpp's
LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)
VLLM_PYTHON = os.environ.get("VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))


def random_model() -> ExportableModel:
    """The weights of _decode_gptsmith."""
    torch.manual_seed(0)
    config = ModelConfig.preset("gpt2")
    data = Path(os.environ.get("GPTSMITH_DATA", ROOT / "tests" / "fixtures" / "data"))
    tokenizer = Tokenizer.gpt2(data / "gpt2_bpe")
    return ExportableModel("random", config, GPTModel(config).state_dict, tokenizer)


def export_gguf(model: ExportableModel, folder: Path, kinds: list[str]) -> dict[str, Path]:
    """The files of these of f16, q8_0 and q4_0."""
    from gptsmith.interop import gguf

    found: dict[str, Path] = {}
    for kind in dict.fromkeys(["f16", *kinds]):
        target = folder / kind / f"random-{kind}.gguf"
        if kind == "q4_0":
            target.parent.mkdir()
            words = ["-m", "benchmarks._decode_llama_cpp", str(found["f16"]), str(target)]
            subprocess.run([LLAMA_PYTHON, *words], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        else:
            gguf.export(model, target.parent, kind)  # type: ignore[arg-type]
        found[kind] = target
    return found


def contestants(
    weights: list[str], folder: Path, sizes: tuple[int, int]
) -> dict[str, Callable[[], Contestant]]:
    """Who takes part, started when called. Who is missing is said."""
    found: dict[str, Callable[[], Contestant]] = {}
    model = random_model()
    kinds = [PAIRS[name] for name in weights]
    files = {}
    if imports(LLAMA_PYTHON, "llama_cpp"):
        files = export_gguf(model, folder, kinds)
    else:
        print(f"no llama-cpp-python in {LLAMA_PYTHON}: LLAMA_PYTHON names another")
    for name, kind in zip(weights, kinds, strict=True):
        found[name] = lambda name=name: Contestant(  # type: ignore[misc]
            sys.executable, "_decode_gptsmith", name, *sizes
        )
        if kind in files:
            found[f"llama.cpp {kind}"] = lambda kind=kind: Contestant(  # type: ignore[misc]
                LLAMA_PYTHON, "_decode_llama_cpp", files[kind], *sizes, torch.get_num_threads()
            )
    if not imports(VLLM_PYTHON, "vllm"):
        print(f"no vLLM in {VLLM_PYTHON}: VLLM_PYTHON names another")
    elif "bfloat16" in weights:
        from gptsmith.interop import hf

        hf.export(model, folder / "hf", torch.bfloat16)
        found["vLLM bfloat16"] = lambda: Contestant(
            VLLM_PYTHON, "_decode_vllm", folder / "hf", *sizes,
            environment=vllm_environment(VLLM_PYTHON),
        )  # fmt: skip
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--weights", default=",".join(PAIRS), help="of " + ", ".join(PAIRS))
    parser.add_argument("--device", default="cpu", help="cuda: measure our engine there, alone")
    options = parser.parse_args(argv)
    if options.device != "cpu":
        return _decode_device.compare(
            options.device, options.rounds, options.tokens, options.prompt
        )
    running: dict[str, Contestant] = {}
    figures: dict[str, Rounds] = {}
    speed = []
    with tempfile.TemporaryDirectory() as name, closing_all() as groups:
        chosen = options.weights.split(",")
        for title, start in contestants(
            chosen, Path(name), (options.tokens, options.prompt)
        ).items():
            running[title], figures[title] = start(), []
            groups.append(running[title])
        for i in range(options.rounds):
            speed.append(read_bytes())
            for title, contestant in running.items():
                figures[title].append(contestant.measure())
            one_row = ", ".join(f"{title} {1 / rows[-1][0]:.1f}" for title, rows in figures.items())
            print(
                f"round {i + 1} of {options.rounds}: memory {speed[-1] / 1e9:.1f} GB/s, "
                f"one row {one_row}",
                file=sys.stderr,
                flush=True,
            )
    limit = statistics.median(speed)
    print(f"{torch.get_num_threads()} threads; memory {limit / 1e9:.1f} GB/s; tokens per second")
    print(f"{'':16} {'1 row':>8} {'of limit':>9} {'8 rows':>8} {'32 rows':>8} {'prompt':>8}")
    for title, rounds in figures.items():
        one, eight, many, prompt = (
            1 / statistics.median(column) for column in zip(*rounds, strict=True)
        )
        share = one * running[title].ready / limit
        print(f"{title:16} {one:8.1f} {share:9.0%} {eight:8.0f} {many:8.0f} {prompt:8.0f}")
    print("\ntimes as fast, in the median of the rounds:")
    for ours, others in PAIRS.items():
        for other in (f"llama.cpp {others}", f"vLLM {ours}"):
            if ours in figures and other in figures:
                one, eight, many, prompt = _ratios(figures[ours], figures[other])
                print(f"{f'{ours} / {other}':28} {one:5.2f} {eight:9.2f} {many:8.2f} {prompt:8.2f}")


def _ratios(ours: Rounds, others: Rounds) -> list[float]:
    """How many times as fast ours is, by column. The speed of a shared machine drifts from round to
    round, so measurements that are next to each other are compared."""
    pairs = zip(zip(*ours, strict=True), zip(*others, strict=True), strict=True)
    return [
        statistics.median(other / one for one, other in zip(*columns, strict=True))
        for columns in pairs
    ]


if __name__ == "__main__":
    main(sys.argv[1:])

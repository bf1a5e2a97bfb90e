"""(b) Seconds to a validation loss: tiny Shakespeare by characters, whole commands, alternating.

    python -m benchmarks convergence [--rounds 2]

The classic CPU recipe, as a plain loop over transformers' GPT2LMHeadModel (4 layers, 128 wide, 4
heads, context 64, batch 12, AdamW, 2,000 steps, fp32), against `gptsmith pretrain
configs/shakespeare-char.yaml`; then what our recipe reaches in the time that the classic one took.
Loss in nats per character over disjoint windows of 64 characters of the last tenth of the text.
Start-up is counted on both sides. The share is that of the machine's own best large square matrix
product over the whole command, counting 6N + 12 * n_layer * n_embd * T FLOPs per trained token: how
much of the gain is speed, and how much comes from needing fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks._machine import gemm_flops

from gptsmith.model import flops
from gptsmith.model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "shakespeare-char.yaml"


@dataclass(frozen=True)
class Outcome:
    """A whole command: its wall-clock seconds, its final loss, and its FLOPs."""

    seconds: float
    loss: float
    flops: float

    def summary(self, gemm: float) -> str:
        share = self.flops / self.seconds / gemm
        return f"{self.seconds:.1f} s to {self.loss:.3f} at {share:.0%}"


def run(argv: Sequence[str | Path]) -> tuple[float, str]:
    """Wall-clock seconds of a command, and what it printed; its last line of errors if it fails."""
    begin = time.perf_counter()
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().rpartition("\n")[2])
    return time.perf_counter() - begin, done.stdout


def theirs(corpus: Path) -> Outcome:
    """The classic recipe in a process of its own."""
    seconds, printed = run([sys.executable, ROOT / "benchmarks" / "_classic.py", corpus])
    loss, vocab_size = json.loads(printed)
    shape = dict(n_layer=4, n_head=4, n_embd=128, context_length=64, vocab_size=vocab_size)
    model = ModelConfig.preset("gpt2", **shape)
    return Outcome(seconds, loss, 2000 * 12 * 64 * flops.flops_per_token(model))


def ours(corpus: Path, out: Path, *more: str) -> Outcome:
    """Our command, the validation loss and the tokens that it recorded."""
    argv: list[str | Path] = ["-m", "gptsmith", "pretrain", RECIPE, "--data", corpus, "--out", out]
    seconds, _ = run([sys.executable, *argv, "--train.device", "cpu", *more])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    loss = [e["val_loss"] for e in events if e["event"] == "val"][-1]
    tokens = [e["tokens"] for e in events if e["event"] == "train"][-1]
    model = ModelConfig.model_validate_json((out / "model.json").read_text())
    return Outcome(seconds, loss, tokens * flops.flops_per_token(model))


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(argv)
    os.environ.setdefault("GPTSMITH_DATA", str(ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "shakespeare"
        words = ["prepare", "shakespeare", "--tokenizer", "char", "--out", str(corpus)]
        run([sys.executable, "-m", "gptsmith", *words])
        budgets, gemm = [], gemm_flops(torch.device("cpu"))
        print(f"matrix product {gemm / 1e9:,.0f} GFLOP/s", flush=True)
        for i in range(options.rounds):
            mine = ours(corpus, folder / f"run{i}")
            other = theirs(corpus)
            budgets.append(other.seconds)
            gemm = gemm_flops(torch.device("cpu"))
            print(
                f"round {i + 1}: classic {other.summary(gemm)}, gptsmith {mine.summary(gemm)}: "
                f"ratio {other.seconds / mine.seconds:.2f}",
                flush=True,
            )
        budget = statistics.median(budgets)
        limits = ["--train.steps", "none", "--train.seconds", f"{budget - 5:.1f}"]
        more = ["--train.batch-size", "32", "--optim.momentum", "0.9"]
        more += ["--optim.learning-rate", "0.007"]
        outcome = ours(corpus, folder / "long", *limits, *more)
        print(f"gptsmith in the classic recipe's time: {outcome.summary(gemm)}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Seconds to a validation loss: tiny Shakespeare by characters, whole commands, taking turns.

    python -m benchmarks.convergence [--rounds 2]

The classic CPU recipe, as a plain loop over transformers' GPT2LMHeadModel (4 layers, 128 wide, 4
heads, context 64, batch 12, AdamW, 2,000 steps, fp32), against `gptsmith pretrain
configs/shakespeare-char.yaml`; then what our recipe reaches in the time that the classic one took.
Loss in nats per character over disjoint windows of 64 characters of the last tenth of the text.
Start-up is counted on both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve()
RECIPE = HERE.parents[1] / "configs" / "shakespeare-char.yaml"


def classic(corpus: Path) -> float:
    """The classic recipe in this process: the validation loss it ends at."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    train, val = (
        torch.from_numpy(np.load(corpus / f"{split}-00000.npy").astype(np.int64))
        for split in ("train", "val")
    )
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=int(train.max()) + 1,
            n_positions=64,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    for step in range(2000):
        rate = 1e-3 * (step + 1) / 101
        if step >= 100:
            rate = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (step - 100) / 1900))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(len(train) - 65, (12,))
        rows = torch.stack([train[i : i + 65] for i in at])
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    n = (len(val) - 1) // 64 * 64
    with torch.no_grad():
        logits = model(val[:n].view(-1, 64)).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), val[1 : n + 1]))


def run(argv: Sequence[str | Path]) -> tuple[float, str]:
    """Wall-clock seconds of a command, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=True)
    return time.perf_counter() - begin, done.stdout


def ours(corpus: Path, out: Path, *more: str) -> tuple[float, float]:
    """Seconds of our command and the validation loss that it recorded."""
    argv = ["-m", "gptsmith", "pretrain", RECIPE, "--data", corpus, "--out", out, *more]
    seconds, _ = run([sys.executable, *argv])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return seconds, [e["val_loss"] for e in events if e["event"] == "val"][-1]


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.convergence")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--classic", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.classic:
        print(classic(arguments.classic))
        return
    os.environ.setdefault("GPTSMITH_DATA", str(HERE.parents[2] / "shared" / "data"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "shakespeare"
        prepare = ["prepare", "shakespeare", "--tokenizer", "char", "--out", corpus]
        run([sys.executable, "-m", "gptsmith", *prepare])
        theirs, mine = [], []
        for i in range(arguments.rounds):
            mine.append(ours(corpus, folder / f"run{i}"))
            seconds, printed = run([sys.executable, HERE, "--classic", corpus])
            theirs.append((seconds, float(printed)))
            print(
                f"round {i + 1}: classic {seconds:.1f} s to {theirs[-1][1]:.3f}, gptsmith "
                f"{mine[-1][0]:.1f} s to {mine[-1][1]:.3f}: ratio {seconds / mine[-1][0]:.2f}",
                flush=True,
            )
        budget = statistics.median(s for s, _ in theirs)
        limits = ["--train.steps", "none", "--train.seconds", f"{budget - 5:.1f}"]
        more = ["--train.batch-size", "32", "--optim.momentum", "0.9"]
        seconds, loss = ours(corpus, folder / "long", *limits, *more)
        print(f"gptsmith in the classic recipe's time ({seconds:.1f} s): {loss:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])

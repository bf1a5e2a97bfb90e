"""Whether runs take the time and the memory that `gptsmith plan` said, and reach the loss.

    python -m benchmarks plan [--data CORPUS] [--budgets 2m 8m] [--rounds 5] [--probe 60s]

Each budget is planned several times, in a process each; the run of the last plan follows at once.
Time and memory are compared with the medians of the plans. Without --data: wikitext-2 in bytes, for
which a scaling law is known. --probe: expect the loss by a probe, as for an unknown text.
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
from pathlib import Path

from gptsmith.train.monitor import read_events

ROOT = Path(__file__).resolve().parents[1]


def gptsmith(*words: object) -> str:
    """What a command prints; its last line of errors if it fails."""
    argv = [sys.executable, "-m", "gptsmith", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().rpartition("\n")[2])
    return done.stdout


def line(name: str, said: float, found: float, digits: int = 0) -> str:
    return f"| {name} | {said:,.{digits}f} | {found:,.{digits}f} | {said / found - 1:+.1%} |"


def compare(data: Path, budget: str, rounds: int, probe: str | None, folder: Path) -> None:
    recipe, out = folder / f"{budget}.yaml", folder / budget
    plans = []
    for _ in range(rounds):
        recipe.unlink(missing_ok=True)
        words = ["--data", data, "--time", budget, "--out", recipe, "--format", "json"]
        plan = json.loads(gptsmith("plan", *words, *(["--probe", probe] if probe else [])))
        plans.append(plan["runs"][plan["chosen"]])
    # the plans may differ by a step, so their speeds are compared
    last = plans[-1]
    seconds = statistics.median(p["seconds"] / p["steps"] for p in plans) * last["steps"]
    memory = statistics.median(p["memory"] for p in plans)
    began = time.perf_counter()
    gptsmith("pretrain", recipe, "--out", out)
    took = time.perf_counter() - began
    vals = [event for event in read_events(out / "metrics.jsonl") if event["event"] == "val"]
    print(f"\n{data.name}, {budget}: depth {last['depth']}, {last['steps']:,} steps\n")
    print("| | said | found | |", "|---|---:|---:|---:|", sep="\n")
    print(line("seconds", seconds, took))
    print(line("MB", memory / 1e6, max(event["peak_memory_mb"] for event in vals)))
    if last["loss"] is not None:
        print(line("loss", last["loss"], vals[-1]["val_loss"], digits=3), flush=True)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["2m", "8m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probe")
    options = parser.parse_args(argv)
    os.environ.setdefault("GPTSMITH_DATA", str(ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data
        if data is None:
            data = folder / "wikitext-2"
            gptsmith("prepare", "wikitext-2", "--tokenizer", "byte", "--out", data)
        for budget in options.budgets:
            compare(data, budget, options.rounds, options.probe, folder)


if __name__ == "__main__":
    main(sys.argv[1:])

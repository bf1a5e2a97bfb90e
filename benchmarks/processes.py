"""(f) Several processes on this machine: `pretrain` on one rank and on two, `prepare` by tasks.

    python -m benchmarks processes [--rounds 3] [--data FOLDER]

Whole commands, alternating, medians. Training: configs/bench-gpt2-10m.yaml, eager, four
micro-batches of 4 rows a step; tokens per second without the first steps. Every rank has one
thread, so two ranks would at best be twice as fast as one; one process with two threads is the
alternative on one machine, and shares memory instead of adding up gradients. That two ranks of one
CPU do not reach twice the speed says little about GPUs, each of which has memory and links of its
own. Preparing: the folder's english_novels with GPT-2's vocabulary, one worker per task.
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
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "bench-gpt2-10m.yaml"
STEPS, FIRST = 9, 3  # of the steps, so many are not counted
TASKS = (1, 2, 4)


def command(words: Sequence[str | Path], ranks: int = 1, **environment: str) -> float:
    """Wall-clock seconds of `gptsmith WORDS`; ends with what it said if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    argv = [sys.executable, *(launcher if ranks > 1 else []), "-m", "gptsmith", *map(str, words)]
    began = time.perf_counter()
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def training_speed(corpus: Path, out: Path, ranks: int, threads: int) -> float:
    """Tokens per second of all ranks."""
    words: list[str | Path] = ["pretrain", RECIPE, "--data", corpus, "--out", out]
    words += ["--train.steps", str(STEPS), "--train.batch-size", "4"]
    words += ["--train.total-batch-tokens", str(4 * 4 * 256), "--train.num-threads", str(threads)]
    words += ["--train.device", "cpu", "--train.compile", "off", "--monitor.trackers", "none"]
    words += ["--monitor.log-interval", "1", "--eval.interval", "0", "--eval.sample-tokens", "0"]
    words += ["--eval.tokens", "1000"]
    command(words, ranks, OMP_NUM_THREADS=str(threads))
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [event["tokens_per_second"] for event in events if event["event"] == "train"]
    return statistics.median(speeds[FIRST:])


def alternate(
    measurements: dict[str, Callable[[Path], float]], rounds: int, folder: Path
) -> dict[str, float]:
    """The median of each measurement, which is given a new path."""
    found: dict[str, list[float]] = {name: [] for name in measurements}
    for number in range(rounds):
        for at, (name, measure) in enumerate(measurements.items()):
            found[name].append(measure(folder / f"{number}-{at}"))
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks processes")
    parser.add_argument(
        "--data", default=os.environ.get("GPTSMITH_DATA", ROOT.parent / "shared/data")
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    novels = Path(options.data) / "english_novels"
    if not any(novels.glob("*.txt")):
        print(f"{novels}: no text to measure with; give its folder with --data")
        return
    os.environ["GPTSMITH_DATA"] = str(options.data)
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), min(novels.glob("*.txt"), key=lambda path: path.stat().st_size)
        corpus = folder / "corpus"
        command(["prepare", source, "--tokenizer", "bpe", "--vocab-size", "4096", "--out", corpus])
        speeds = alternate(
            {
                "1 rank, 1 thread": lambda out: training_speed(corpus, out, 1, 1),
                "2 ranks, 1 thread each": lambda out: training_speed(corpus, out, 2, 1),
                "1 rank, 2 threads": lambda out: training_speed(corpus, out, 1, 2),
            },
            options.rounds,
            folder,
        )
        base = speeds["1 rank, 1 thread"]
        print(f"\n{'training':28}{'tokens/s':>10}{'ratio':>8}")
        for who, speed in speeds.items():
            print(f"{who:28}{speed:10,.0f}{speed / base:8.2f}", flush=True)

        def prepare(tasks: int) -> Callable[[Path], float]:
            words = ["prepare", str(novels), "--tokenizer", "gpt2", "--tasks", str(tasks)]
            return lambda out: command([*words, "--workers", "1", "--out", str(out)])

        seconds = alternate(
            {f"{tasks} tasks": prepare(tasks) for tasks in TASKS}, options.rounds, folder / "p"
        )
        size = sum(path.stat().st_size for path in novels.glob("*.txt")) / 1e6
        print(f"\n{f'prepare, {size:.0f} MB':28}{'seconds':>10}{'MB/s':>8}")
        for who, taken in seconds.items():
            print(f"{who:28}{taken:10.1f}{size / taken:8.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])

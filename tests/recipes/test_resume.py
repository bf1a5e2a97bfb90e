"""Killed with SIGKILL at any moment and resumed, a run ends as if nothing had happened.

These are processes that start anew; more kills, in every stage, are in test_kills.py.
"""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from failing_disk import content, differences
from runs import GPTSMITH, assert_same_checkpoints, assert_same_weights, events, finish

from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.train import checkpoint

STEPS = 240
KILLS = 30 if os.environ.get("GPTSMITH_SOAK") else 8  # `make soak`


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home"]
    for i in range(40):
        text = " ".join(rng.choice(words) for _ in range(400))
        (folder / f"{i}.txt").write_text(text)
    return prepare(
        PrepareConfig(
            sources=(str(folder / "*.txt"),), out=folder / "corpus", tokenizer="byte",
            shard_tokens=20_000,
        )
    )  # fmt: skip


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    """A run with all that could differ after a crash: dropout, accumulation, Muon, several shards
    and epochs, document masks, evaluation and samples at intervals."""
    return [
        "pretrain", "--data", str(corpus), "--out", str(out),
        "--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32",
        "--model.context-length", "32", "--model.dropout", "0.1", "--document-mask",
        "--train.steps", str(STEPS), "--train.batch-size", "8", "--train.total-batch-tokens", "512",
        "--train.num-threads", "1", "--train.seed", "3", "--eval.interval", "40",
        "--eval.tokens", "2000", "--eval.sample-tokens", "8", "--save.interval", "10",
        "--monitor.trackers", "none", "--monitor.log-interval", "1", *more,
    ]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen:
    argv = [*GPTSMITH, *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def record(run: Path) -> list[dict]:
    """Without what depends on the clock and on the number of starts."""
    timed = {"seconds", "tokens_per_second", "peak_memory_mb", "crc32"}
    found = events(run, "train", "val", "sample")
    return [{k: v for k, v in e.items() if k not in timed} for e in found]


def same_state(a: Path, b: Path) -> None:
    assert checkpoint.find(a / "checkpoints")[0].step == STEPS
    assert_same_checkpoints(a, b)
    assert_same_weights(a, b)
    assert record(a) == record(b)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(command(corpus, run))
    return run


def stored(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def trained_to(log: Path) -> int:
    """The last step on record."""
    steps = re.findall(r'^{"event": "train", "step": (\d+)', log.read_text(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def test_killed_at_random_moments(corpus, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    rng = random.Random(int(os.environ.get("GPTSMITH_KILL_SEED", "1")))
    for n in range(KILLS):
        newest = max(checkpoint.steps(run / "checkpoints"), default=None)
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = start(command(corpus, run, *([] if newest is None else ["--resume"])))
        goal = (newest or 0) + rng.randrange(5, 16)
        early = time.monotonic() + rng.random() * 3 if n % 5 == 2 else math.inf
        # In one of the next steps, while it saves, measures or draws a sample; each fifth time
        # while Python starts or the run is opened. On a fast machine it may have ended by itself.
        while process.poll() is None and time.monotonic() < early:
            if log.exists() and log.stat().st_mtime_ns != before and trained_to(log) >= goal:
                time.sleep(rng.random() * 0.03)
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
    finish(command(corpus, run, "--resume"))
    same_state(whole, run)
    one, two = (content(each) for each in (run, whole))
    for each in (one, two):  # they name the run
        del each["config.yaml"], each["report.md"], each["digests.json"]
    assert one == two, differences(one, two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_75(corpus, whole, tmp_path, number):
    run = tmp_path / "run"
    process = start(command(corpus, run, "--save.interval", "0"))
    while process.poll() is None:
        log = run / "metrics.jsonl"
        if log.exists() and log.read_text().count('"train"') >= 5:
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "--resume" in errors
    step = checkpoint.find(run / "checkpoints")[0].step
    assert 0 < step < STEPS
    finish(command(corpus, run, "--save.interval", "0", "--resume"))
    same_state(whole, run)


def test_resuming_a_finished_run_changes_nothing(corpus, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert "metrics.jsonl lacks" not in finish(command(corpus, run, "--resume"))
    same_state(whole, run)


@pytest.mark.parametrize("lost", [slice(None), slice(30, 31)])
def test_lost_metrics_are_said(corpus, whole, tmp_path, lost):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    gone = sum(b'"event": "note"' not in line for line in lines[lost])
    del lines[lost]
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    said = finish(command(corpus, run, "--resume"))
    assert re.search(rf"metrics.jsonl lacks {gone} of \d+ events up to step {STEPS}", said)


def test_damaged_newest_checkpoint_is_reported_and_the_next_used(corpus, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest, _ = checkpoint.find(run / "checkpoints")
    weights = newest.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    said = finish(command(corpus, run, "--resume"))
    assert f"{newest.step} is damaged" in said
    same_state(whole, run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model.n-layer", "3"], "model.n_layer: 2 -> 3"),
        (["--train.seed", "4"], "train.seed: 3 -> 4"),
        (["--optim.kind", "adamw"], "optim.kind: muon -> adamw"),
        (["--train.total-batch-tokens", "256"], "train.total_batch_tokens: 512 -> 256"),
    ],
)
def test_resume_rejects_changed_settings(corpus, whole, change, says):
    files = stored(whole)
    done = subprocess.run(
        [*GPTSMITH, *command(corpus, whole, "--resume", *change)], capture_output=True, text=True
    )
    assert files == stored(whole)  # a rejected command changes nothing
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_second_process_in_one_folder_is_rejected(corpus, tmp_path):
    run = tmp_path / "run"
    first = start(command(corpus, run, "--train.steps", "1000000"))
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
        assert first.poll() is None
    second = subprocess.run(
        [*GPTSMITH, *command(corpus, run, "--resume")], capture_output=True, text=True
    )
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert str(first.pid) in second.stderr

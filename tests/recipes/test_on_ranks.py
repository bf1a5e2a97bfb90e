"""Every stage on several ranks, resumed on another number of them, killed, stopped.

CI runs a sample; `make test-scale` runs all: many processes, minutes.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_commands import on_all
from ranks import STEPS, TRAINING, finish, on, scale, start
from ranks import pretrain as small_pretrain
from runs import (
    assert_same_checkpoints,
    assert_same_weights,
    events,
    losses,
    stop_at,
    write_inputs,
)

from gptsmith.recipes.loop import STOPPED
from gptsmith.run import Run
from gptsmith.train import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SAVING = ["--save.interval", "8", "--save.keep-last", "9"]


def pretrain(corpus: Path, out: Path, *more: str) -> list[str]:
    """Four micro-batches per step."""
    size = ["--train.total-batch-tokens", "256"]
    return small_pretrain(corpus, out, *SAVING, *size, *more)


# --- the stages ----------------------------------------------------------------------------------

STAGES = {
    "chat": ["--data", "chat.jsonl", "--lora.rank", "2"],
    "text": ["--data", "CORPUS", "--freeze", "embedding.*"],
    "instruct": ["--data", "rows.json", "--responses", "2", "--response-tokens", "4",
                 "--prompt", "{instruction}{input}\nA:\n", "--no-pack"],
    "classify": ["--data", "rows.csv"],
    "preference": ["--data", "pairs.jsonl"],
}  # fmt: skip


SAMPLED = [
    stage if stage in ("chat", "preference") else pytest.param(stage, marks=scale)
    for stage in STAGES
]


@pytest.fixture
def finetune(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """stage -> words of a fine-tuning with two micro-batches per step."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)

    def words(stage: str) -> list[str]:
        size = ["--train.total-batch-tokens", "256"]  # of two rows of 64 each
        if stage in ("classify", "preference"):
            size = [f"--{'texts' if stage == 'classify' else 'pairs'}-per-step", "4"]
        data = [str(corpus) if word == "CORPUS" else word for word in STAGES[stage]]
        start = ["finetune", stage, "--from", str(base), "--dropout", "0.1"]
        return [*start, *TRAINING, *SAVING, *data, *size]

    return words


@pytest.mark.parametrize("stage", SAMPLED)
def test_two_ranks_fine_tune_as_one_process_does(
    stage: str, finetune: Callable[[str], list[str]]
) -> None:
    words = finetune(stage)
    on(1, [*words, "--out", "one"])
    on(2, [*words, "--out", "two"])
    assert losses(Path("one")) == losses(Path("two"))
    for a, b in zip(events(Path("one"), "val"), events(Path("two"), "val"), strict=True):
        assert a["val_loss"] == b["val_loss"]
    assert_same_checkpoints(Path("one"), Path("two"))
    assert_same_weights(Path("one"), Path("two"))
    names = [{p.name for p in Path(run).iterdir()} for run in ("one", "two")]
    assert names[0] == names[1]


@scale
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_fine_tune_a_sharded_model(
    stage: str, finetune: Callable[[str], list[str]]
) -> None:
    """Adapters and frozen parameters are divided as well."""
    words = [*finetune(stage), "--optim.kind", "adamw"]
    on(1, [*words, "--out", "one"])
    on(2, [*words, "--train.shard", "--out", "two"])
    assert losses(Path("one")) == pytest.approx(losses(Path("two")), abs=1e-5)
    for a, b in zip(events(Path("one"), "val"), events(Path("two"), "val"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)
    assert Run.open("two").load_model() is not None


# --- other numbers of ranks ----------------------------------------------------------------------


COUNTS = range(1, 5)
NEAR = {"adamw": 1e-5, "muon": 1e-4}  # Muon amplifies rounding; measured: 5e-7 (docs/log.md)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, KIND-RANKS."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in COUNTS:
        runs = [(kind, folder / f"{kind}-{ranks}") for kind in NEAR]
        on_all(ranks, [pretrain(corpus, run, "--optim.kind", kind) for kind, run in runs])
    return folder


@pytest.fixture(scope="module")
def resumed(whole: Path) -> Path:
    """The same folder, with KIND-BEFORE-AFTER: saved by BEFORE ranks, resumed by AFTER."""
    for after in COUNTS:
        runs = [whole / f"{kind}-{before}" for kind in NEAR for before in COUNTS]
        copies = [stop_at(8, run, whole / f"{run.name}-{after}") for run in runs]
        on_all(after, [["pretrain", "--out", str(copy), "--resume"] for copy in copies])
    return whole


@scale
@pytest.mark.parametrize("after", COUNTS)
@pytest.mark.parametrize("before", COUNTS)
@pytest.mark.parametrize("kind", NEAR)
def test_resumed_on_another_number_of_ranks(
    kind: str, before: int, after: int, resumed: Path
) -> None:
    run, whole = resumed / f"{kind}-{before}-{after}", resumed / f"{kind}-{before}"
    assert len(losses(run)) == STEPS
    if before == after:
        assert losses(run) == losses(whole)
        assert_same_checkpoints(run, whole)
    assert losses(run)[8:13] == pytest.approx(losses(whole)[8:13], abs=NEAR[kind])


# --- kills and signals ---------------------------------------------------------------------------

LONG = ["--train.steps", "60", "--save.interval", "5"]


@scale
def test_killed_ranks_end_all_and_the_run_resumes_with_the_same_bits(
    corpus: Path, tmp_path: Path
) -> None:
    """Rank 0, another one or all of them, at any moment, also while rank 0 saves."""
    rng = random.Random(os.environ.get("GPTSMITH_KILL_SEED", "1"))
    whole, run = tmp_path / "whole", tmp_path / "run"
    on(2, pretrain(corpus, whole, *LONG))
    for kill in range(20):
        resume = ["--resume"] if checkpoint.steps(run / "checkpoints") else []
        ranks = start(2, ["-m", "gptsmith", *pretrain(corpus, run, *LONG), *resume])
        before = (run / "metrics.jsonl").stat().st_mtime_ns if resume else 0
        goal = max(checkpoint.steps(run / "checkpoints"), default=0) + rng.randrange(1, 6)
        while all(rank.poll() is None for rank in ranks):
            log = run / "metrics.jsonl"
            if log.exists() and log.stat().st_mtime_ns != before and events(run, "train"):
                if kill % 3 == 2 and any((run / "checkpoints").glob("step-*.tmp-*")):
                    break  # in a save
                if events(run, "train")[-1]["step"] >= goal:
                    break
            time.sleep(0.001)
        victims = ([ranks[1]], ranks, [ranks[0]])[kill % 3]
        for rank in victims:
            rank.send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes = [code for code, _, _ in finish(ranks)]
        assert time.monotonic() - began < 30
        assert all(codes) or codes == [0, 0]  # else a rank was left that believed in its end
    on(2, [*pretrain(corpus, run, *LONG), "--resume"])
    assert losses(run) == losses(whole)
    assert_same_checkpoints(run, whole)
    assert_same_weights(run, whole)


@scale
def test_torchrun_passes_a_signal_on_and_its_ranks_save(corpus: Path, tmp_path: Path) -> None:
    """torchrun itself ends with 1, whatever its ranks end with."""
    run, words = tmp_path / "run", ["--train.steps", "5000"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         "-m", "gptsmith", *pretrain(corpus, run, *words)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (run / "metrics.jsonl").exists() or not events(run, "train"):
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    assert said.count("SIGTERM: saved at step") == 1
    step = checkpoint.steps(run / "checkpoints")[-1]
    assert step > 0
    on(2, ["pretrain", "--out", str(run), "--resume", "--train.steps", str(step + 3)])


@scale
def test_clocks_of_different_speed_decide_alike(corpus: Path, tmp_path: Path) -> None:
    """A run with a time limit, in which every rank has another idea of the time: that of rank 0
    counts, which is slow here, so that the start does not take all of it."""
    skewed = (
        "import os, sys, time; real, speed = time.perf_counter, 0.2 + 2 * int(os.environ['RANK']);"
        "time.perf_counter = lambda: real() * speed;"
        "from gptsmith.commands.pretrain import main;"
        "sys.exit(main(sys.argv[2:], time.perf_counter()))"
    )
    words = pretrain(
        corpus, tmp_path / "run", "--train.steps", "none", "--train.seconds", "9",
        "--save.interval", "0", "--save.seconds", "0.2", "--eval.interval", "500",
    )  # fmt: skip
    done = finish(start(2, ["-c", skewed, *words]))
    assert [code for code, _, _ in done] == [0, 0], done
    trained = events(tmp_path / "run", "train")
    assert trained[-1]["seconds"] >= 9
    assert all(event["seconds"] <= 9 for event in trained[:-1])


@scale
def test_a_signal_in_an_evaluation_stops_all_ranks(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = pretrain(
        corpus, run, "--train.steps", "5000", "--eval.interval", "1", "--eval.sample-tokens", "32"
    )
    ranks = start(2, ["-m", "gptsmith", *words])
    while not (run / "metrics.jsonl").exists() or not events(run, "train"):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.002)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    done = finish(ranks)
    assert [code for code, _, _ in done] == [STOPPED, STOPPED], done


@scale
def test_a_full_disk_of_rank_0_is_one_message(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from gptsmith.cli import main; sys.exit(main())"
    )
    done = finish(start(2, ["-c", limited, *pretrain(corpus, run)]))
    said = "".join(err for _, _, err in done)
    assert all(code for code, _, _ in done)
    assert said.count("File too large") == 1, said
    assert "Traceback" not in said

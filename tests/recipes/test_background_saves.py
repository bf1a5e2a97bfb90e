"""Checkpoints that are written while training goes on: the same bytes, and none is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_checkpoints, assert_same_weights, events

from gptsmith import cli
from gptsmith.recipes import plan
from gptsmith.recipes.loop import STOPPED
from gptsmith.train import checkpoint
from gptsmith.train import step as step_module
from gptsmith.train.signals import StopSignal
from gptsmith.train.step import derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")

SAVED = [0, 3, 6, 9, 12]


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        "pretrain", "--data", str(corpus), "--out", str(out),
        "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16",
        "--model.context-length", "32", "--model.dropout", "0.1",
        "--train.steps", "12", "--train.batch-size", "2", "--train.num-threads", "1",
        "--save.interval", "3", "--save.keep-last", "9", "--eval.interval", "0",
        "--monitor.log-interval", "1", "--monitor.trackers", "none", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(command(corpus, run, "--no-save.async")) == 0
    return run


def trained_to(run: Path) -> int:
    return max((event["step"] for event in events(run, "train")), default=0)


def tensors(run: Path, step: int) -> dict[str, bytes]:
    folder = run / f"checkpoints/step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_training_goes_on_and_the_checkpoints_are_the_same(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save begins to write when training is two steps ahead, except for the first, without
    which the run could not be resumed, and the last."""
    run, save, ahead = tmp_path / "run", checkpoint.save, []

    def late(folder: Path, step: int, *arguments: object) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        while 0 < step < 12 and trained_to(run) < step + 2:
            time.sleep(0.001)
        ahead.append(trained_to(run) - step)
        return save(folder, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", late)
    assert cli.main(command(corpus, run)) == 0
    assert ahead[0] == ahead[-1] == 0
    assert min(ahead[1:-1]) >= 2
    assert checkpoint.steps(run / "checkpoints") == SAVED
    for step in SAVED:
        assert tensors(run, step) == tensors(whole, step)
    assert_same_weights(run, whole)


def test_sigterm_while_it_writes_saves_again_and_waits_for_both(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A batch system may repeat SIGTERM before it kills: the last save goes on."""
    run, save = tmp_path / "run", checkpoint.save

    def interrupted(folder: Path, step: int, *arguments: object) -> Path:
        while step == 3 and trained_to(run) < 4:  # before the signal, which abandons a step
            time.sleep(0.001)
        if step >= 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert cli.main(command(corpus, run)) == STOPPED
    stopped = trained_to(run)
    assert f"SIGTERM: saved at step {stopped}; --resume continues" in capsys.readouterr().err
    assert checkpoint.steps(run / "checkpoints") == [0, 3, stopped]
    assert checkpoint.find(run / "checkpoints") == (
        checkpoint.Checkpoint(run / f"checkpoints/step-{stopped:06d}", stopped), []
    )  # fmt: skip


@pytest.mark.parametrize("interval", ["3", "2"], ids=["not saved yet", "saved"])
def test_a_signal_in_a_step_abandons_it_and_resume_computes_it_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, interval: str
) -> None:
    """In the second of the four micro-batches of step 5."""
    save, handle, written = checkpoint.save, StopSignal._handle, []
    handled = threading.Event()

    def counted(folder: Path, step: int, *arguments: object) -> Path:
        written.append(step)
        return save(folder, step, *arguments)

    def noted(self: StopSignal, *arguments: Any) -> None:
        handle(self, *arguments)
        handled.set()

    def interrupted(seed: int, step: int, number: int, *more: int) -> int:
        if (step, number) == (4, 1):
            os.kill(os.getpid(), signal.SIGTERM)
            while not handled.is_set():
                time.sleep(0.001)
        return derive_seed(seed, step, number, *more)

    words = command(corpus, tmp_path / "run", "--train.total-batch-tokens", "256")
    words += ["--save.interval", interval]
    whole = [*words, "--out", str(tmp_path / "whole")]
    assert cli.main(whole) == 0
    monkeypatch.setattr(checkpoint, "save", counted)
    monkeypatch.setattr(StopSignal, "_handle", noted)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "derive_seed", interrupted)
        assert cli.main(words) == STOPPED
    assert "SIGTERM: saved at step 4; --resume continues" in capsys.readouterr().err
    assert trained_to(tmp_path / "run") == 4
    assert written == ([0, 3, 4] if interval == "3" else [0, 2, 4])
    assert cli.main([*words, "--resume"]) == 0
    assert_same_checkpoints(tmp_path / "run", tmp_path / "whole")


def test_a_signal_at_a_step_whose_save_is_due_saves_it_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = checkpoint.save, []

    def interrupted(folder: Path, step: int, *arguments: object) -> Path:
        written.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert cli.main(command(corpus, tmp_path / "run", "--save.interval", "1")) == STOPPED
    assert written == [*range(len(written))]
    assert 4 <= len(written) < 12


SLOWLY = (
    "import sys, time; from gptsmith.train import checkpoint; real = checkpoint.digest;"
    "checkpoint.digest = lambda path: (time.sleep(0.1), real(path))[1];"
    "from gptsmith.train.signals import StopSignal as Stop; handle = Stop._handle;"
    "Stop._handle = lambda *all: (handle(*all), print('received', file=sys.stderr));"
    "from gptsmith.cli import main; sys.exit(main())"
)


def being_written(run: Path) -> int:
    """The step of a checkpoint that is not complete yet; 0 if there is none."""
    begun = (run / "checkpoints").glob("step-*.tmp-*")
    steps = [path.name[5:11] for path in begun if not (path / "manifest.json").exists()]
    return int(steps[0]) if steps else 0


@pytest.mark.parametrize("how", ["SIGKILL", "Ctrl-C twice"])
def test_ended_while_it_writes_and_resumed_it_has_the_same_bits(
    how: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """A process of its own, whose saves take at least a third of a second."""
    run = tmp_path / "run"
    words = [sys.executable, "-c", SLOWLY, *command(corpus, run)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not 0 < being_written(run) < trained_to(run):
        assert process.poll() is None
        time.sleep(0.002)
    if how == "SIGKILL":
        process.kill()
        process.communicate()
    else:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("received" in line for line in process.stderr)  # two at a time are one
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert said.endswith(
            "interrupted; the checkpoint being written is abandoned, the one before it stays\n"
        )
    assert cli.main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert_same_checkpoints(run, whole)
    assert_same_weights(run, whole)


def test_a_save_that_fails_ends_training_with_its_reason(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, sync = tmp_path / "run", checkpoint.sync

    def full(path: Path) -> None:
        if "step-000003" in str(path):
            raise OSError(28, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", full)
    code = cli.main(command(corpus, run, "--train.steps", "100000"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert "step-000003" in last
    assert os.strerror(28) in last
    assert code == 1
    assert checkpoint.find(run / "checkpoints")[0].step == 0
    assert 3 <= trained_to(run) <= 6  # the next save would have waited for it
    monkeypatch.undo()
    assert cli.main(["pretrain", "--out", str(run), "--resume", "--train.steps", "4"]) == 0


def test_without_memory_for_copies_training_waits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = tmp_path / "run", checkpoint.save

    def at_once(*arguments: object) -> Path:
        assert threading.current_thread() is threading.main_thread()
        return save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(plan.runtime, "memory_bytes", lambda device: 300_000)  # 270,000 to train
    monkeypatch.setattr(checkpoint, "save", at_once)
    assert cli.main(command(corpus, run, "--train.steps", "1")) == 0
    notes = [event["message"] for event in events(run, "note")]
    assert any("waits for checkpoints: writing them in the background takes" in n for n in notes)

"""A disk that is full, fails, or stops at any call: whole results or none, and a rerun completes.

Each command that writes is run once to count its calls that touch the disk; then one of them fails.
What is tried: each of FAULTS at every call that it can touch, or, where a command says `every`, at
every so-manyth. `make soak` tries all of these, `make test` a few of each command.
"""

import errno
import hashlib
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from failing_disk import (
    AVAILABLE,
    KILL,
    SHORT,
    Disk,
    Fault,
    Outcome,
    content,
    differences,
    empty,
)
from runs import write_inputs

from gptsmith.run import Run, is_run
from gptsmith.train import checkpoint

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux and a C compiler")

SOAK = bool(os.environ.get("GPTSMITH_SOAK"))
POINTS = 4  # of each command, without GPTSMITH_SOAK
MANY = 13  # `every` of commands whose calls are mostly those of `pretrain`, where all are tried

FAULTS = [
    Fault(errno.ENOSPC),
    Fault(errno.ENOSPC, lasting=True),
    Fault(errno.EIO),
    Fault(errno.EIO, lasting=True),
    Fault(KILL),
    Fault(SHORT),
    Fault(errno.EINTR),
]
STEPS = [
    "--train.steps", "3", "--train.batch-size", "2", "--train.num-threads", "1",
    "--train.device", "cpu", "--train.precision", "fp32", "--train.compile", "off",
    "--save.interval", "2", "--save.seconds", "600", "--eval.interval", "2",
    "--monitor.log-interval", "1",
]  # fmt: skip
TRAINING = [*STEPS, "--eval.tokens", "64", "--eval.sample-tokens", "4"]
QUIET = ["--monitor.trackers", "none"]
MODEL = [
    "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16",
    "--model.context-length", "64",
]  # fmt: skip
TUNING = [*TRAINING, *QUIET, "--from", "../base"]


@dataclass(frozen=True)
class Command:
    """A command that writes into its working directory; what it reads is beside that."""

    words: list[str]
    before: list[list[str]] = field(default_factory=list)  # commands that made what is there
    text: str = ""  # standard input
    run: str = ""  # the run folder that it trains
    every: int = 1  # one point in so many is tried

    def again(self, folder: Path) -> list[str]:
        """What one types after a failure."""
        resumes = self.run and checkpoint.steps(folder / self.run / "checkpoints")
        return [*self.words, "--resume"] if resumes else self.words


PREPARE = [
    "prepare", "../text.txt", "--tokenizer", "bpe", "--vocab-size", "300", "--out", "corpus",
    "--shard-tokens", "1500", "--workers", "1",
]  # fmt: skip
PRETRAIN = ["pretrain", "--data", "../corpus", "--out", "run", *MODEL, *TRAINING]
PREPARE_CHAT = ["prepare", "../chat.jsonl", "--format", "chat", "--tokenizer", "../base"]
PREPARE_CHAT += ["--out", "chat.arrow"]
CHAT = ["chat", "../adapted", "--max-new-tokens", "3", "--device", "cpu"]
SAVE = "Hello\n/save chats.jsonl\n"
SCORES = [
    "evaluate",
    "../base",
    "--data",
    "../short.txt",
    "--out",
    "scores.json",
    "--device",
    "cpu",
]
CLASSES = ["classify", "../classifier", "--device", "cpu", "--out", "classes.csv", "--file"]
ANSWERS = ["--responses", "2", "--response-tokens", "4", "--prompt", "{instruction}{input}\nA:\n"]
ANSWERS += TUNING
PRACTICE = ["--reward", "regex:[a-m]", "--prompts-per-step", "2", "--group-size", "2"]
PRACTICE += ["--max-new-tokens", "4", "--val-prompts", "2", "--val-fraction", "0.3"]
PRACTICE += [*STEPS, *QUIET, "--from", "../adapted"]


# Files that show how far a run has come.
PROGRESS = ("metrics.jsonl", "metrics.csv", "samples.txt", "report.md", "digests.json")


def tune(kind: str, data: str) -> list[str]:
    return ["finetune", kind, "--data", data, "--out", "run"]


COMMANDS = {
    "prepare": Command(PREPARE),
    "prepare again": Command(
        [*PREPARE, "--overwrite"], before=[[*PREPARE, "--val-fraction", "0.2"]]
    ),
    "prepare chat": Command(PREPARE_CHAT),
    "pretrain": Command([*PRETRAIN, *QUIET], run="run"),
    "pretrain tensorboard": Command(
        [*PRETRAIN, "--monitor.trackers", "tensorboard"], run="run", every=MANY
    ),
    "pretrain on": Command(
        ["pretrain", "--out", "run", "--train.steps", "6"], before=[[*PRETRAIN, *QUIET]], run="run"
    ),
    "finetune text": Command([*tune("text", "../corpus"), *TUNING], run="run", every=MANY),
    "finetune chat": Command(
        [*tune("chat", "../chat.jsonl"), "--lora.rank", "2", *TUNING], run="run", every=MANY
    ),
    "finetune instruct": Command(
        [*tune("instruct", "../rows.json"), *ANSWERS], run="run", every=MANY
    ),
    "finetune classify": Command(
        [*tune("classify", "../rows.csv"), "--texts-per-step", "2", *TUNING], run="run", every=MANY
    ),
    "finetune preference": Command(
        [*tune("preference", "../pairs.jsonl"), "--pairs-per-step", "2", *TUNING],
        run="run",
        every=MANY,
    ),
    "finetune reward": Command(
        [*tune("reward", "../prompts.jsonl"), *PRACTICE], run="run", every=MANY
    ),
    "export hf": Command(["export", "../base", "--format", "hf", "--out", "model"]),
    "export gguf": Command(["export", "../base", "--format", "gguf", "--out", "model"]),
    "export adapter": Command(
        ["export", "../adapted", "--format", "hf", "--adapter", "--out", "model"]
    ),
    "import": Command(["import", "../exported", "--out", "run"]),
    "chat": Command([*CHAT, "--seed", "1"], before=[[*CHAT, "--seed", "2"]], text=SAVE),
    "evaluate": Command(SCORES, before=[[*SCORES, "--stride", "32"]]),
    "classify": Command([*CLASSES, "../rows.csv"], before=[[*CLASSES, "../short.csv"]]),
}
"""Name -> command. What it reads (`../base`) is made by `inputs`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def disk(folder: Path) -> Iterator[Disk]:
    (folder / "work").mkdir()
    with Disk(folder / "work") as disk:
        yield disk


@pytest.fixture(scope="module")
def inputs(disk: Disk, folder: Path) -> Path:
    """Text, chats, rows, a corpus and runs."""
    write_inputs(folder)
    for command in (
        ["prepare", "../text.txt", "--tokenizer", "byte", "--out", "../corpus"],
        ["pretrain", "--data", "../corpus", "--out", "../base", *MODEL, *TRAINING, *QUIET],
        ["finetune", "chat", "--data", "../chat.jsonl", "--out", "../adapted", "--lora.rank", "2",
         *TUNING],
        ["finetune", "classify", "--data", "../rows.csv", "--out", "../classifier", *TUNING,
         "--texts-per-step", "2"],
        ["export", "../base", "--format", "hf", "--out", "../exported"],
    ):  # fmt: skip
        done = disk.run(command)
        assert done.code == 0, done.stderr
    return folder


@dataclass
class Trial:
    """A command, what was there before, and what it makes."""

    command: Command
    disk: Disk
    before: Path  # a copy of what was there
    had: dict[str, bytes]
    makes: dict[str, bytes]
    counted: Outcome
    settled: set[str] = field(default_factory=set)  # states that a rerun has completed

    def restore(self) -> None:
        empty(self.disk.folder)
        shutil.copytree(self.before, self.disk.folder, dirs_exist_ok=True)

    def fail(self, fault: Fault, at: int) -> str:
        """One failure and the rerun; what is wrong, or an empty text."""
        self.restore()
        done = self.disk.run(self.command.words, fault, at, text=self.command.text)
        place = f"{fault} at {at}, {done.failed or 'not reached'}"
        found = [*self.wrong_outcome(done, fault), *self.wrong_files()]
        if not found and content(self.disk.folder) != self.makes:
            found = self.wrong_rerun()
        return "\n".join(f"{place}: {each}" for each in found)

    def wrong_outcome(self, done: Outcome, fault: Fault) -> Iterator[str]:
        if not done.failed or fault.error in (SHORT, errno.EINTR):
            if done.code or content(self.disk.folder) != self.makes:
                found = differences(content(self.disk.folder), self.makes)
                yield f"code {done.code}, {done.message}; {found}"
            return
        if fault.error == KILL:
            if done.code != -signal.SIGKILL:
                yield f"code {done.code} instead of SIGKILL"
            return
        if done.code == 0:  # what failed was not needed, or was tried again
            if content(self.disk.folder) != self.makes:
                yield f"code 0, but {differences(content(self.disk.folder), self.makes)}"
            return
        if done.code != 1:
            yield f"code {done.code}: {done.stderr[-1500:]}"
        path = done.failed.partition(" ")[2]
        shown = os.path.relpath(path, self.disk.folder).split("/")[0]
        if temporary := re.fullmatch(r"\.(.*)\.tmp-\w{8}(\.\w+)?", shown):
            shown = temporary[1] + (temporary[2] or "")
        if os.strerror(fault.error) not in done.message or shown not in done.message:
            yield f"the message does not name {shown}: {done.stderr[-1500:]}"
        if ".tmp-" in done.message:
            yield f"the message names a temporary file: {done.message}"
        if "Traceback" in done.stderr or len(done.message) > 400:
            yield f"not one line: {done.stderr[-1500:]}"

    def wrong_files(self) -> Iterator[str]:
        """Files that are neither the earlier ones, nor those that the command makes."""
        folder, command = self.disk.folder, self.command
        found = content(folder)
        replaced = "corpus/unfinished/manifest.json" in found  # a complete one is being moved there
        for name in self.had.keys() - found.keys():
            if name.startswith("run/checkpoints/") or (replaced and name.startswith("corpus/")):
                continue  # pruned
            yield f"{name} is lost"
        for name, data in found.items():
            path = Path(name)
            if data in (self.had.get(name), self.makes.get(name)):
                continue
            if ".tmp" in name or "unfinished" in path.parts or "tensorboard" in path.parts:
                continue
            if path.name in PROGRESS:
                continue  # as far as the run has come
            if path.name == "curves.png" or path.parts[1:2] == ("checkpoints",):
                continue  # checkpoints are verified below
            yield f"{name} is neither the earlier nor the new file"
        for split in ("corpus", "model"):
            there = {name for name in found if name.startswith(f"{split}/")}
            whole = {name for name in self.makes if name.startswith(f"{split}/")}
            done = f"{split}/manifest.json" in there if split == "corpus" else bool(there)
            if whole and done and not whole <= there:
                yield f"{split} is there but not whole: it lacks {sorted(whole - there)}"
        if command.run and is_run(folder / command.run):
            run = Run.open(folder / command.run)
            steps = checkpoint.steps(run.checkpoints)
            for step in steps:
                checkpoint.find(run.checkpoints, step)  # raises if it is damaged
            if steps and not run.weights.exists():
                run.load_model()

    def wrong_rerun(self) -> list[str]:
        """What is wrong after the rerun. Equal states are run once."""
        state = fingerprint(self.disk.folder)
        if state in self.settled:
            return []
        done = self.disk.run(self.command.again(self.disk.folder), text=self.command.text)
        if done.code:
            return [f"the rerun ends with code {done.code}: {done.stderr[-1500:]}"]
        found = content(self.disk.folder)
        if found != self.makes:
            return [f"after the rerun, {differences(found, self.makes)}"]
        self.settled.add(state)
        return []


def fingerprint(folder: Path) -> str:
    """Of all files but their random names and times."""
    digest = hashlib.sha256()
    for name, data in content(folder).items():
        digest.update(name.partition(".tmp-")[0].encode() + hashlib.sha256(data).digest())
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            digest.update(str(path.relative_to(folder)).partition(".tmp-")[0].encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def trials(disk: Disk, inputs: Path, tmp_path_factory: pytest.TempPathFactory):
    def trial(name: str) -> Trial:
        command = COMMANDS[name]
        empty(disk.folder)
        for words in command.before:
            done = disk.run(words, text=command.text)
            assert done.code == 0, done.stderr
        before = tmp_path_factory.mktemp("before")
        shutil.copytree(disk.folder, before, dirs_exist_ok=True)
        had = content(disk.folder)
        done = disk.run(
            command.again(disk.folder) if command.run else command.words, text=command.text
        )
        assert done.code == 0, done.stderr
        command = replace(command, words=command.again(before))
        return Trial(command, disk, before, had, content(disk.folder), done)

    return trial


@pytest.mark.parametrize("name", COMMANDS)
def test_results_are_whole_or_absent(name: str, trials: Callable[[str], Trial]) -> None:
    trial = trials(name)
    points = [(f, at) for f in FAULTS for at in range(1, trial.counted.calls(f) + 1)]
    chosen = points[:: trial.command.every]
    if not SOAK:
        chosen = random.Random(name).sample(chosen, POINTS)
    wrong = [each for fault, at in chosen if (each := trial.fail(fault, at))]
    print(f"{name}: {len(chosen)} of {len(points)} points")
    assert not wrong, f"{len(wrong)} of {len(chosen)} points:\n" + "\n".join(wrong)

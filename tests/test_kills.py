"""A whole life, killed again and again, ends with the files of an undisturbed one, byte for byte.

Kills come at a chosen call that changes a file, often one of the last (final weights, report), or
at a moment. Processes that start anew are killed in recipes/test_resume.py.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from failing_disk import AVAILABLE, KILL, Disk, Fault, content, differences, empty
from runs import write_inputs

from gptsmith.train import checkpoint

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux and a C compiler")

SOAK = bool(os.environ.get("GPTSMITH_SOAK"))
SEED = os.environ.get("GPTSMITH_KILL_SEED", "1")

TRAINING = [
    "--train.steps", "12", "--train.batch-size", "2", "--train.num-threads", "1",
    "--train.device", "cpu", "--train.precision", "fp32", "--train.compile", "off",
    "--save.interval", "2", "--save.seconds", "600", "--eval.interval", "4", "--eval.tokens", "64",
    "--eval.sample-tokens", "4", "--monitor.log-interval", "1", "--monitor.trackers", "none",
    "--optim.learning-rate", "0.01", "--optim.warmup-steps", "3",
]  # fmt: skip
MODEL = [
    "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.dropout", "0.1",
    "--model.context-length", "64",
]  # fmt: skip
TUNING = [*TRAINING, "--from", "base", "--dropout", "0.1"]

# (words, run that they train, kills, kills in `make test`)
STAGES = [
    (["prepare", "../text.txt", "--tokenizer", "bpe", "--vocab-size", "300", "--out", "corpus",
      "--shard-tokens", "1500", "--workers", "1"], "", 10, 3),
    (["pretrain", "--data", "corpus", "--out", "base", *MODEL, *TRAINING], "base", 25, 5),
    (["prepare", "../chat.jsonl", "--format", "chat", "--tokenizer", "base", "--out", "c.arrow"],
     "", 5, 1),
    (["finetune", "chat", "--data", "c.arrow", "--out", "chat", "--lora.rank", "2", *TUNING],
     "chat", 20, 4),
    (["finetune", "text", "--data", "corpus", "--out", "more", "--freeze", "embedding.*", *TUNING],
     "more", 8, 2),
    (["finetune", "instruct", "--data", "../rows.json", "--out", "instructed", "--responses", "2",
      "--response-tokens", "4", "--prompt", "{instruction}{input}\nA:\n", *TUNING],
     "instructed", 8, 2),
    (["finetune", "classify", "--data", "../rows.csv", "--out", "classifier", "--texts-per-step",
      "2", *TUNING], "classifier", 8, 2),
    (["finetune", "preference", "--data", "../pairs.jsonl", "--out", "preferred",
      "--pairs-per-step", "2", *TUNING], "preferred", 8, 2),
    (["export", "base", "--format", "hf", "--out", "exported"], "", 4, 1),
    (["export", "chat", "--format", "hf", "--adapter", "--out", "adapter"], "", 4, 1),
    (["export", "base", "--format", "gguf", "--out", "gguf"], "", 4, 1),
    (["import", "exported", "--out", "imported"], "", 4, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("life")
    write_inputs(folder)
    (folder / "work").mkdir()
    return folder


def test_a_life_killed_again_and_again_leaves_the_same_files(folder: Path) -> None:
    rng, work, kills = random.Random(SEED), folder / "work", 0
    with Disk(work) as disk:
        for words, *_ in STAGES:
            done = disk.run(words)
            assert done.code == 0, done.stderr
        expected = content(work)
        empty(work)
        for words, run, many, few in STAGES:
            goal = kills + (many if SOAK else few)
            while kills < goal:
                kills += kill(disk, again(words, work / run), rng, folder / "copy")
                out = work / words[-1]
                if out.is_file():  # killed when it was whole, which would now be rejected
                    assert content(work)[out.name] == expected[out.name]
                    out.unlink()
                elif words[0] in ("export", "import") and out.exists():
                    assert content(out) == below(expected, out.name)
                    shutil.rmtree(out)
            done = disk.run(again(words, work / run))
            assert done.code == 0, done.stderr
    assert kills == (108 if SOAK else 25)
    assert content(work) == expected, differences(content(work), expected)


def below(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {n.removeprefix(f"{folder}/"): d for n, d in files.items() if n.startswith(f"{folder}/")}


def again(words: list[str], run: Path) -> list[str]:
    return [*words, "--resume"] if checkpoint.steps(run / "checkpoints") else words


def kill(disk: Disk, words: list[str], rng: random.Random, copy: Path) -> bool:
    """Run `words` and kill it on the way; whether it was alive until then."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(disk.folder, copy)
    begin = time.monotonic()
    whole = disk.run(words)
    duration = time.monotonic() - begin
    assert whole.code == 0, whole.stderr
    empty(disk.folder)
    shutil.copytree(copy, disk.folder, dirs_exist_ok=True)
    if rng.random() < 0.3:
        return disk.run(words, seconds=rng.random() * duration).code != 0
    calls = whole.calls(Fault(KILL))
    first = max(1, calls - 30) if rng.random() < 0.4 else 1
    done = disk.run(words, Fault(KILL), rng.randint(first, calls))
    assert done.code == -9, done.stderr
    return True

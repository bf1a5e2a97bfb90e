"""Questions that a model is asked while it trains: what it learned shows in its answers."""

import csv
import json
import random
from pathlib import Path

import pytest

from gptsmith import cli
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare

VOICES = {"cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A corpus of animals' voices, and questions about them."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    animals = [rng.choice(list(VOICES)) for _ in range(3000)]
    (folder / "text.txt").write_text("".join(f"the {a} says {VOICES[a]}. " for a in animals))
    questions = [
        {"ctx": f"the {animal} says", "endings": [*VOICES.values()], "label": label}
        for label, animal in enumerate(VOICES)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    prepare(
        PrepareConfig(sources=(str(folder / "text.txt"),), out=folder / "data", tokenizer="byte")
    )
    return folder


def pretrain(world: Path, out: Path, *more: str) -> int:
    return cli.main(
        [
            "pretrain", "--data", str(world / "data"), "--out", str(out), "--model", "nano",
            "--model.context-length", "32", "--train.steps", "150", "--train.batch-size", "16",
            "--train.compile", "off", "--optim.learning-rate", "0.02", "--eval.interval", "50",
            "--eval.sample-tokens", "0", "--eval.tasks", "hellaswag_gpt2",
            "--eval.task-data", str(world / "questions.jsonl"), "--monitor.trackers", "none", *more,
        ]
    )  # fmt: skip


def test_scores_are_recorded_and_drawn_with_the_loss(world, tmp_path, capsys):
    assert pretrain(world, tmp_path / "run", "--train.steps", "100") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [event for event in map(json.loads, lines) if event["event"] == "tasks"]
    assert [event["step"] for event in found] == [0, 50, 100]
    scores = [event["hellaswag_gpt2_acc_token"] for event in found]
    assert scores[0] < 1
    assert scores[-1] == 1
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert float(rows["100"]["hellaswag_gpt2_acc_token"]) == 1
    assert rows["100"]["val_loss"]
    assert "step 100: hellaswag gpt2 acc 1" in capsys.readouterr().err
    height = int.from_bytes((tmp_path / "run" / "curves.png").read_bytes()[20:24], "big")
    assert height == round(1.35 * 6 * 150)  # three panels; in the header of a PNG
    # resumed, the record and the picture go on
    more = ("--resume", "--train.steps", "150")
    assert pretrain(world, tmp_path / "run", *more) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [event for event in map(json.loads, lines) if event["event"] == "tasks"]
    assert [event["step"] for event in found] == [0, 50, 100, 150]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--eval.tasks", "helaswag"), "helaswag"),
        (("--eval.task-data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model.context-length", "4"), "4 of 4 questions are left out"),
    ],
)
def test_unreadable_questions_fail_before_training(world, tmp_path, capsys, more, says):
    assert pretrain(world, tmp_path / "run", *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

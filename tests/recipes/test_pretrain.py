"""The pretraining command end to end: recipes, run length, masks, early stopping, user errors."""

import csv
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import events

from gptsmith import cli
from gptsmith.commands import pretrain
from gptsmith.config import load_config
from gptsmith.interop.hf_mapping import transformers_class
from gptsmith.recipes import loop
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run import Run
from gptsmith.train import checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32",
    "--model.context-length", "32", "--train.batch-size", "4", "--train.num-threads", "1",
    "--monitor.trackers", "none",
]  # fmt: skip


def command(corpus: Path, out: Path, *words: str) -> list[str]:
    return ["pretrain", "--data", str(corpus), "--out", str(out), *SMALL, *words]


def train(corpus: Path, out: Path, *words: str) -> int:
    return cli.main(command(corpus, out, *words))


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_trains(recipe, corpus, tmp_path):
    """Two steps of each, its own architecture one layer deep and narrow enough for a test."""
    run = tmp_path / "run"
    small = ["--model.context-length", "32", "--train.batch-size", "2", "--model.n-layer", "1"]
    length = ["--train.steps", "2", "--train.total-batch-tokens", "128", "--eval.tokens", "500"]
    for name in ("tokens", "epochs", "seconds"):
        length += [f"--train.{name}", "none"]
    where = ["--data", str(corpus), "--out", str(run), "--monitor.trackers", "none"]
    assert cli.main(["pretrain", str(recipe), *where, *small, *length]) == 0
    assert events(run, "val")[-1]["step"] == 2
    opened = Run.open(run)
    assert opened.load_model().config == opened.model_config


def test_every_recipe_has_a_transformers_class():
    """A recipe that leaves an axis to the default preset is another model than its name says."""
    expected = {
        "bench-gpt2-10m": "GPT2LMHeadModel",
        "course-full": "LlamaForCausalLM",
        "course-tiny": "LlamaForCausalLM",
        "distilgpt2-wikipedia": "GPT2LMHeadModel",
        "gpt2-fineweb": "GPT2LMHeadModel",
        "shakespeare-char": "Qwen3ForCausalLM",
    }
    found = {}
    for path in CONFIGS.glob("*.yaml"):
        argv = [str(path), "--data", "-", "--out", "-"]
        recipe = load_config(PretrainConfig, argv, prog="pretrain")
        found[path.stem] = transformers_class(recipe.model)
    assert found == expected


def test_run_folder_is_complete(corpus, tmp_path):
    run = tmp_path / "run"
    assert train(corpus, run, "--train.steps", "30", "--eval.interval", "15") == 0
    for name in ("config.yaml", "model.json", "model.safetensors", "tokenizer.json", "report.md",
                 "metrics.jsonl", "metrics.csv", "curves.png", "samples.txt"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert list(rows[0]) == ["step", "epoch", "train_loss", "val_loss", "learning_rate", "tokens",
                             "seconds", "tokens_per_second"]  # fmt: skip
    validations = events(run, "val")
    assert [e["step"] for e in validations] == [0, 15, 30]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert validations[-1]["bits_per_byte"] == pytest.approx(
        validations[-1]["val_loss"] / torch.log(torch.tensor(2.0)).item(), rel=1e-3
    )


def test_final_evaluation_uses_ten_times_the_tokens(corpus, tmp_path):
    run = tmp_path / "run"
    more = ("--train.steps", "4", "--eval.interval", "2", "--eval.tokens", "64")
    assert train(corpus, run, *more) == 0
    assert [(e["step"], e["tokens"]) for e in events(run, "val")] == [
        (0, 64), (2, 64), (4, 64), (4, 640)
    ]  # fmt: skip


def test_learns(corpus, tmp_path):
    """The arithmetic is a pattern that a small model must pick up: from 5.5 nats to under 1.3."""
    assert train(corpus, tmp_path / "run", "--train.steps", "300", "--eval.interval", "0") == 0
    assert events(tmp_path / "run", "val")[-1]["val_loss"] < 1.3


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (["--train.tokens", "1280"], 10),
        (["--train.epochs", "0.01"], 5),
        (["--train.steps", "7"], 7),
    ],
)
def test_run_length(corpus, tmp_path, length, steps):
    assert train(corpus, tmp_path / "run", *length) == 0
    assert events(tmp_path / "run", "val")[-1]["step"] == steps


def test_run_length_in_seconds(corpus, tmp_path):
    """The schedule follows the clock, whatever the speed: each rate is that of its moment, and the
    time before the first step (imports, the first evaluation) is not decay."""
    run, words = tmp_path / "run", ["--monitor.log-interval", "1", "--optim.warmup-steps", "0"]
    argv = ["--data", str(corpus), "--out", str(run), *SMALL, *words, "--train.seconds", "3"]
    assert pretrain.main([*argv, "--optim.schedule", "linear"], started=time.perf_counter()) == 0
    steps = events(run, "train")
    assert steps[-2]["seconds"] <= 3 <= steps[-1]["seconds"]  # rounded to milliseconds
    state = checkpoint.find(run / "checkpoints")[0].state["learning_rate"]
    begin = state["warmup_seconds"]
    assert steps[0]["learning_rate"] == 3e-3
    for before, step in pairwise(steps):
        left = [1 - (e["seconds"] - begin) / (3 - begin) for e in (step, before)]
        at = [3e-3 * (0.05 + 0.95 * each) for each in left]
        assert at[0] - 1e-5 <= step["learning_rate"] <= at[1] + 1e-5


def test_longer_run_says_where_the_learning_rate_stands_and_jumps(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--eval.interval", "0", "--monitor.log-interval", "1", "--optim.schedule", "linear"]
    assert train(corpus, run, "--train.steps", "8", "--optim.warmup-steps", "2", *words) == 0
    for again in ([], ["--train.steps", "8"]):  # nothing changes, nothing is said
        assert cli.main(["pretrain", "--out", str(run), "--resume", *again]) == 0
        assert "jumps" not in capsys.readouterr().err
    assert cli.main(["pretrain", "--out", str(run), "--resume", "--train.steps", "12"]) == 0
    said = "the learning rate stands at 0.00015 and jumps to 0.00129, "
    assert said in capsys.readouterr().err
    assert "the run now ends at step 12 (67% is done)" in (run / "report.md").read_text()
    found = [e["learning_rate"] for e in events(run, "train")]
    assert max(found) == found[2] == 3e-3
    assert found[8] == pytest.approx(3e-3 * (0.05 + 0.95 * 0.4))


def test_resume_with_an_end_before_the_present_step_is_rejected(corpus, tmp_path, capsys):
    run, more = tmp_path / "run", ["--eval.interval", "0", "--save.interval", "2"]
    assert train(corpus, run, "--train.steps", "6", *more) == 0
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    resume = ["pretrain", "--out", str(run), "--resume"]
    assert cli.main([*resume, "--train.steps", "4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is at step 6, and would now end at step 4: --train.steps 6 ends it where it is" in said
    assert before == [path.read_bytes() for path in files]
    shutil.rmtree(run / "checkpoints/step-000006")  # stopped at step 4 of 6, it may end there
    assert cli.main([*resume, "--train.steps", "4"]) == 0
    assert max(checkpoint.steps(run / "checkpoints")) == 4


def test_warmup_longer_than_the_run_is_shortened(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "run", "--train.steps", "6", "--monitor.log-interval", "1") == 0
    assert "warm-up shortened to 3 steps: " in capsys.readouterr().err
    assert max(e["learning_rate"] for e in events(tmp_path / "run", "train")) == 3e-3


def test_a_short_run_of_the_default_length_is_said(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "run", "--train.batch-size", "128") == 0
    assert "one pass over this corpus, the default, is 15 steps" in capsys.readouterr().err
    assert train(corpus, tmp_path / "given", "--train.steps", "2") == 0
    assert "one pass" not in capsys.readouterr().err


def test_seconds_count_from_the_start_of_the_command(corpus, tmp_path):
    run = tmp_path / "run"
    argv = ["pretrain", "--data", str(corpus), "--out", str(run), *SMALL, "--train.seconds", "1"]
    program = "import sys, time; time.sleep(1); from gptsmith.cli import main; main(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, check=True)
    assert not events(run, "train")  # the second was over before the first step
    assert min(event["seconds"] for event in events(run, "val")) > 1


def test_early_stopping_keeps_the_best(corpus, tmp_path):
    run = tmp_path / "run"
    words = ["--train.steps", "400", "--eval.interval", "10", "--eval.patience", "2"]
    assert (
        train(corpus, run, *words, "--optim.learning-rate", "3", "--optim.max-grad-norm", "0") == 0
    )
    validations = {e["step"]: e["val_loss"] for e in events(run, "val")}
    assert max(validations) < 400
    best = min(validations, key=validations.__getitem__)
    ended = max(validations)
    best_step, chosen, last = (
        Run.open(run).load_model(which).state_dict() for which in (best, "last", ended)
    )
    assert all(torch.equal(best_step[name], chosen[name]) for name in chosen)
    assert not all(torch.equal(last[name], chosen[name]) for name in chosen)
    assert (run / f"checkpoints/step-{best:06d}").is_dir()


@pytest.mark.parametrize(
    "mask", ["causal() & sliding_window(8)", "prefix(5)", "causal() & ~(prefix(3) & causal())"]
)
def test_training_with_masks(corpus, tmp_path, mask):
    run = tmp_path / "run"
    assert train(corpus, run, "--model.mask", mask, "--train.steps", "3") == 0
    opened = Run.open(run)
    assert opened.load_model().mask.expression == opened.model_config.mask


def test_mask_from_a_file(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rule = "def strided(b, h, q, k):\n    return (k <= q) & ((q - k) % 2 == 0)\n"
    Path("rules.py").write_text(rule)
    run = tmp_path / "run"
    steps = ["--train.steps", "6", "--save.interval", "3", "--save.keep-last", "9"]
    assert train(corpus, run, "--model.mask", "rules.py:strided", *steps) == 0
    Path("rules.py").unlink()  # the run keeps its own copy
    assert cli.main(["generate", str(run), "--max-new-tokens", "3"]) == 2
    assert "--trust-code" in capsys.readouterr().err
    assert cli.main(["generate", str(run), "--max-new-tokens", "3", "--trust-code"]) == 0
    assert cli.main(["pretrain", "--out", str(run), "--resume", "--train.steps", "8"]) == 0
    assert events(run, "val")[-1]["step"] == 8


def test_mask_that_sees_its_target_is_rejected(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "run", "--model.mask", "bidirectional()") == 2
    message = capsys.readouterr().err
    assert "can see token 1" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train.steps", "5", "--train.epochs", "1"], "give one length of the run"),
        (["--train.total-batch-tokens", "100"], "context_length = 128: give 128"),
        (["--model.context-length", "1000000"], "fewer than context_length"),
        (["--model.n-head", "5"], "n_embd 32"),
        (["--train.device", "tpu"], "tpu"),
        (["--train.precision", "fp16", "--train.device", "cpu"], "fp16"),
        (["--monitor.trackers", "nothing-like-it"], "nothing-like-it"),
        (["--optim.learning-rate", "-1"], "learning"),
        (["--model.mask", "causal() &"], "causal() &"),
    ],
)
def test_user_errors(corpus, tmp_path, user_error, words, says):
    assert says in user_error(*command(corpus, tmp_path / "run", *words))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_divergence_names_the_batch(corpus, tmp_path, capsys):
    words = ["--train.steps", "50", "--train.max-skips", "3", "--train.precision", "fp32"]
    huge = [
        "--optim.learning-rate",
        "1e30",
        "--optim.max-grad-norm",
        "0",
        "--optim.warmup-steps",
        "0",
    ]
    assert train(corpus, tmp_path / "run", *words, *huge, "--optim.kind", "adamw") == 2
    error = capsys.readouterr().err
    assert "samples" in error
    assert "3 steps in a row" in error


def test_missing_corpus(tmp_path):
    argv = [sys.executable, "-m", "gptsmith", "pretrain", "--data", "nowhere", "--out", "run"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gptsmith prepare" in done.stderr


def test_resume_says_what_is_left_and_what_changes(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    resume = ["pretrain", "--out", str(run), "--resume"]
    assert train(corpus, run, "--train.steps", "2", "--eval.tokens", "300") == 0
    assert cli.main(resume) == 0
    assert (
        f"resume: nothing is left to train at step 2 of 2; to go on: gptsmith pretrain --out {run} "
        "--resume --train.steps N"
    ) in capsys.readouterr().err
    assert cli.main([*resume, "--train.steps", "3"]) == 0
    said = capsys.readouterr().err
    assert "resume: changed: train.steps: 2 -> 3" in said
    assert "resume: continues at step 2 of 3" in said
    rows = [line for line in (run / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["0", "2", "3"]  # each step once
    final = events(run, "val")[-1]
    assert final["step"] == 3
    assert final["tokens"] > 9 * events(run, "val")[-2]["tokens"]
    sentence = f"On {final['tokens']:,} tokens, at the end: validation loss"
    assert sentence in (run / "report.md").read_text()


@pytest.mark.parametrize("at", [0, 3])
def test_out_of_memory_is_one_line_and_leaves_a_way_on(at, corpus, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    real, calls = loop.train_steps, []

    def steps(model, loss, *arguments, **named):
        def full(*given):
            calls.append(0)
            if len(calls) > at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss(*given)

        return real(model, full, *arguments, **named)

    monkeypatch.setattr(loop, "train_steps", steps)
    words = ["--train.steps", "6", "--save.interval", "2", "--eval.interval", "0"]
    assert train(corpus, run, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory with train.batch_size 4" in error
    assert "or --train.batch-size 2 --train.total-batch-tokens 128" in error
    monkeypatch.undo()
    if at == 0:  # the folder is free for the smaller batch
        assert train(corpus, run, *words, "--train.batch-size", "2") == 0
    else:
        assert "--resume" in error
        assert cli.main(["pretrain", "--resume", "--out", str(run)]) == 0
    assert events(run, "train")[-1]["step"] == 6


def test_deterministic_runs_compute_their_steps_so(corpus, tmp_path, monkeypatch):
    """On a CPU they are equal anyway; tests/test_gpu.py compares the bits of runs on a GPU."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    real, seen = loop.train_steps, []

    def steps(model, loss, *arguments, **named):
        def watched(*given):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return loss(*given)

        return real(model, watched, *arguments, **named)

    monkeypatch.setattr(loop, "train_steps", steps)
    run = tmp_path / "run"
    assert train(corpus, run, "--train.steps", "2", "--train.deterministic") == 0
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "1 thread, deterministic" in (run / "report.md").read_text()

"""Preference tuning by the real command: what is learned, killed and resumed, what is rejected."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import on
from runs import assert_same_checkpoints, assert_same_weights, events, finish, kill_after, losses

from gptsmith.chat_template.template import TEMPLATE
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.pair_rows import PairRows
from gptsmith.data.pairs import load_pairs
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.tuning import Tuning
from gptsmith.recipes.finetune import shares_prefixes
from gptsmith.run import Run
from gptsmith.train import checkpoint
from gptsmith.train.preference import answer_log_probs

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = [
    "--train.steps", "24", "--train.batch-size", "4", "--pairs-per-step", "8",
    "--train.num-threads", "1", "--train.precision", "fp32", "--eval.interval", "8",
    "--eval.sample-tokens", "4", "--save.interval", "4", "--save.keep-last", "9",
    "--monitor.trackers", "none", "--monitor.log-interval", "1",
    "--optim.learning-rate", "0.003", "--val-fraction", "0.2",
]  # fmt: skip
KINDS = {
    "all": [],
    "lora": ["--lora.rank", "2", "--dropout", "0.1", "--optim.learning-rate", "0.02"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with a polite answer, which is preferred, and a rude one."""
    path = tmp_path_factory.mktemp("preference") / "pairs.jsonl"
    with path.open("w") as file:
        for i in range(60):
            row = {"prompt": f"name {i * i}?", "chosen": f"yes, it is {i}", "rejected": f"no! {i}"}
            file.write(json.dumps(row) + "\n")
    return path


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "finetune", "preference", "--from", str(base),
        "--data", str(data), "--out", str(out), *COMMON, *more,
    ]  # fmt: skip


def test_prompts_are_shared_without_dropout_only() -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=16, context_length=8)
    assert shares_prefixes(GPTModel(config))
    assert not shares_prefixes(GPTModel(config.change(mask="bidirectional()")))
    assert not shares_prefixes(GPTModel(config.change(dropout=0.1)))
    model = GPTModel(config)
    Tuning(lora=LoraConfig(rank=2, dropout=0.1)).wrap(model)
    assert not shares_prefixes(model)


@pytest.fixture(scope="module", params=KINDS)
def tuned(request, base: Path, data: Path, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "run"
    finish(command(base, data, out, *KINDS[request.param]))
    return request.param, out


def test_learns_which_answers_are_preferred(base: Path, tuned) -> None:
    kind, path = tuned
    run = Run.open(path)
    assert run.template == TEMPLATE
    first, *_, last = events(path, "val")
    assert first["val_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (first["val_margin"], first["pairs"]) == (pytest.approx(0, abs=1e-4), 12)
    assert last["val_accuracy"] == 1
    assert first["val_kl"] == pytest.approx(0, abs=1e-6)
    assert last["val_kl"] > 1e-4
    assert last["val_margin"] > 0.5
    assert last["val_loss"] < 0.5
    assert last["val_chosen_logp"] - last["val_rejected_logp"] > (
        first["val_chosen_logp"] - first["val_rejected_logp"]
    )
    trained = events(path, "train")[-1]
    assert trained["train_accuracy"] == 1
    assert {"train_margin", "train_chosen_logp", "train_rejected_logp"} <= trained.keys()
    assert "train_accuracy" in (path / "metrics.csv").read_text().splitlines()[0]
    assert (path / "adapter").is_dir() == (kind == "lora")
    report = (path / "report.md").read_text()
    assert "accuracy of pairs" in report
    assert "all 60 pairs are trained on" in report
    assert len(events(path, "sample")) == 4 * 3


def test_the_reference_is_the_model_before_tuning(data: Path, tuned) -> None:
    """That is the first checkpoint, which has the tokens of the template."""
    _, path = tuned
    run = Run.open(path)
    assert run.chat_template is not None
    pairs, _ = load_pairs([data], PreferenceFiles(), run.chat_template, 64)
    train, val = pairs.split(0.2, 0)
    stored = checkpoint.load_tensors(path / "reference.safetensors")
    model = run.load_model(0)
    for name, part in (("train", train), ("val", val)):
        assert stored[name].shape == (len(part), 2)
        assert (stored[name] < 0).all()
        with torch.no_grad():
            found = answer_log_probs(model, PairRows(part, 0, 0).of(range(len(part))))
        torch.testing.assert_close(stored[name], found.view(2, -1).T, rtol=1e-5, atol=1e-3)


def test_killed_and_resumed_without_its_base(base: Path, data: Path, tuned, tmp_path: Path) -> None:
    kind, whole = tuned
    away, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, away)
    kill_after(8, command(away, data, run, *KINDS[kind]), run)
    shutil.rmtree(away)
    assert 0 < checkpoint.steps(run / "checkpoints")[-1] < 24
    finish(command(away, data, run, *KINDS[kind], "--resume"))
    assert_same_checkpoints(whole, run)
    assert_same_weights(whole, run)
    assert losses(run) == losses(whole)


def test_a_damaged_reference_is_named(base: Path, data: Path, tmp_path: Path, user_error) -> None:
    run = tmp_path / "run"
    words = command(base, data, run, "--train.steps", "4", "--eval.interval", "4")
    words += ["--eval.tokens", "80"]
    on(1, words)
    _, first, final = events(run, "val")
    assert first["step"] == final["step"] == 4
    assert 0 < first["pairs"] < final["pairs"] == 12
    assert "On 12 pairs, at the end: validation loss" in (run / "report.md").read_text()
    reference = run / "reference.safetensors"
    content = bytearray(reference.read_bytes())
    content[-3] ^= 1
    reference.write_bytes(content)
    more = [*words, "--resume", "--train.steps", "6"]
    assert f"{reference} is damaged" in user_error(*more)
    reference.unlink()
    assert f"{reference} is missing" in user_error(*more)


@pytest.mark.parametrize("kind", ["ipo", "sigmoid_norm", "simpo"])
def test_other_losses_learn_too(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    on(1, command(base, data, run, "--loss", kind, "--train.steps", "16"))
    first, *_, last = events(run, "val")
    assert last["val_loss"] < first["val_loss"]
    assert last["val_accuracy"] > 0.8
    assert (run / "reference.safetensors").exists() == ("val_kl" in last) == (kind != "simpo")


def test_user_errors(base: Path, data: Path, tmp_path: Path, user_error) -> None:
    def rejected(*argv: object) -> str:
        return user_error("finetune", "preference", *argv)

    out = tmp_path / "out"
    start = ("--from", base, "--data", data, "--out", out)
    assert "pairs_per_step 6 is not a multiple" in rejected(*start, "--pairs-per-step", "6")
    many = rejected(*start, "--pairs-per-step", "1000000", "--train.batch-size", "4")
    assert many.endswith(
        "pairs_per_step 1,000,000 is more than the 57 pairs to train on: give --pairs-per-step 56"
    )
    alone = rejected(*start, "--pairs-per-step", "128", "--train.batch-size", "64")
    assert alone.endswith("give --pairs-per-step 57 --train.batch-size 57")
    assert "use --pairs-per-step" in rejected(*start, "--train.total-batch-tokens", "512")
    assert "no effect on ipo" in rejected(*start, "--loss", "ipo", "--label-smoothing", "0.1")
    assert "sigmoid_norm" in rejected(*start, "--loss", "sigmoidnorm")
    fp8 = rejected(*start, "--train.precision", "fp8")
    assert "compares the model with one that is evaluated in bf16" in fp8
    assert "belong together" in rejected(*start, "--chosen-column", "a")
    assert "questions 50 is for --data skills, and files are read whole: omit it" in rejected(
        *start, "--questions", "50"
    )
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert "--chosen-column NAME" in rejected("--from", base, "--data", chat, "--out", out)
    short = "--context-length", "9"
    assert "no pair is left: left out: 60 of 60 pairs" in rejected(*start, *short)
    few = tmp_path / "few.jsonl"
    few.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
        '{"prompt": "d", "chosen": "e", "rejected": "e"}\n'
    )
    one = rejected("--from", base, "--data", few, "--out", out)
    assert "few.jsonl: left out: 1 of 2 pairs (50.0%), with equal answers: 1 (" in one
    assert (
        "1 pair is trained on; 1 question cannot be divided into training and validation: give more"
        in one
    )
    skills = ("--from", base, "--data", "skills", "--out", out, "--questions", "20")
    nothing = "--data skills: no pair is left: left out: 20 of 20 pairs"
    assert nothing in rejected(*skills, *short)
    assert nothing in rejected(*skills, *short, "--val", data)
    assert not out.exists()


def test_the_built_in_pairs_need_no_file(base: Path, tmp_path: Path, user_error) -> None:
    run = tmp_path / "run"
    words = [*command(base, Path("skills"), run), "--questions", "60", "--train.steps", "2"]
    on(1, words)
    assert Run.open(run).stage == "preference"
    notes = [event["message"] for event in events(run, "note")]
    assert any("pairs are trained on" in note for note in notes)
    assert "do not mix it with files" in user_error(*words, "--data", "other.jsonl")
    own = command(base, Path("own.jsonl"), run)
    for chosen in (words, own):  # it is no validation set of other data either
        assert "--val skills: the built-in set is for --data" in user_error(
            *chosen, "--val", "skills"
        )

"""Continued pretraining by the real command: it learns, resumes, and changes nothing else."""

from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_weights, events, kill_after, untrained

from gptsmith import cli
from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.data.dataset import Windows
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.model.flops import flops_per_token
from gptsmith.recipes import loop
from gptsmith.recipes import pretrain as recipe
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint

COMMON = [
    "--train.steps", "40", "--train.batch-size", "4", "--train.num-threads", "1",
    "--train.precision", "fp32", "--eval.interval", "20", "--eval.sample-tokens", "6",
    "--save.interval", "5", "--monitor.trackers", "none", "--optim.learning-rate", "0.01",
]  # fmt: skip
KINDS = {
    "all": ["--document-mask"],
    "lora": ["--lora.rank", "2", "--context-length", "32"],
    "frozen": ["--freeze", "blocks.0.*"],
}


def prepared(base: Path, folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("".join(f"{n} plus {n + 1} is {n + n + 1}. " for n in range(2000)))
    out = folder / "corpus"
    return prepare(PrepareConfig(sources=(str(text),), out=out, tokenizer=str(base)))


def argv(base: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        "finetune", "text", "--from", str(base), "--data", str(corpus), "--out", str(out),
        *COMMON, *more,
    ]  # fmt: skip


def test_utilisation_counts_the_flops_of_a_row_not_of_the_whole_context(
    base, corpus, tmp_path, monkeypatch
):
    done = []
    monkeypatch.setattr(loop.runtime, "mfu", lambda work, device: done.append(work))
    out = tmp_path / "run"
    assert cli.main(argv(base, corpus, out, "--context-length", "32")) == 0
    speeds = [event["tokens_per_second"] for event in events(out, "train")]
    per_token = flops_per_token(Run.open(out).model_config, 32)
    assert done == pytest.approx([speed * per_token for speed in speeds], rel=1e-3)
    assert per_token < flops_per_token(Run.open(out).model_config)


@pytest.mark.parametrize("kind", KINDS)
def test_continues_and_resumes_bit_exactly(kind, base, corpus, tmp_path):
    """Another corpus is learned; a run that was killed ends as one that was not."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(argv(base, corpus, whole, *KINDS[kind])) == 0
    found = [e["val_loss"] for e in events(whole, "val")]
    assert found[-1] < (0.98 if kind == "lora" else 0.8) * found[0]
    assert (whole / "adapter").is_dir() == (kind == "lora")
    assert cli.main(["evaluate", str(whole)]) == 0  # its own corpus is the default

    words = argv(base, corpus, killed, *KINDS[kind])
    kill_after(10, words, killed)
    assert 0 < checkpoint.steps(killed / "checkpoints")[-1] < 40
    assert cli.main([*words, "--resume"]) == 0
    assert_same_weights(whole, killed)


def test_chat_model_keeps_its_template(tmp_path):
    tokenizer = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
    base = untrained(tmp_path / "base", tokenizer, TEMPLATE)
    corpus = prepared(base, tmp_path)
    assert cli.main(argv(base, corpus, tmp_path / "run")) == 0
    assert Run.open(tmp_path / "run").template == TEMPLATE


def test_positions_that_see_their_target_are_masked(tmp_path, monkeypatch):
    base = untrained(tmp_path / "base", Tokenizer.byte(), mask="prefix(8)")
    corpus = prepared(base, tmp_path)
    made_of: list[Windows] = []

    def windows(*args: Any) -> Windows:
        made_of.append(make_windows(*args))
        return made_of[-1]

    make_windows = recipe._windows
    monkeypatch.setattr(recipe, "_windows", windows)
    assert cli.main(argv(base, corpus, tmp_path / "run")) == 0
    [rows] = made_of  # of training; validation scores from the same position on
    assert rows.mask_targets_before == 7
    targets = rows.batch(0, 4).targets
    assert (targets[:, :7] == IGNORE_INDEX).all()
    assert (targets[:, 7:] != IGNORE_INDEX).all()


def test_user_errors(base, corpus, tmp_path, user_error):
    def rejected(*words: object) -> str:
        return user_error("finetune", "text", *words, *COMMON)

    out = tmp_path / "out"
    start = ("--from", base, "--data", corpus, "--out", out)
    assert "more than the model's 64" in rejected(*start, "--context-length", "65")
    assert "leaves nothing to train" in rejected(*start, "--freeze", "*")
    assert "no prepared corpus" in rejected("--from", base, "--data", tmp_path / "x", "--out", out)
    folder = tmp_path / "other"
    folder.mkdir()
    other = prepared(untrained(folder / "run", Tokenizer.char(["0123456789 .plusi"])), folder)
    message = rejected("--from", base, "--data", other, "--out", out)
    assert f"prepare it again with --tokenizer {base}" in message
    assert not out.exists()

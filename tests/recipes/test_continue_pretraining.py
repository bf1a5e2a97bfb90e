"""Continued pretraining by the real command: it learns, leaves the rest alone, resumes, refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith import cli
from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template import CHAT_TOKENS, TEMPLATE
from gptsmith.data.dataset import Windows
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import pretrain as recipe
from gptsmith.run import Run, weights
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("base") / "run", Tokenizer.byte(), template=None)


def made(path: Path, tokenizer: Tokenizer, template: str | None, **axes: object) -> Path:
    """An untrained run."""
    size = dict(n_layer=2, n_head=2, n_embd=32, context_length=64)
    config = ModelConfig(**size, vocab_size=tokenizer.vocab_size, **axes)
    torch.manual_seed(0)
    with Run.create(path, {"note": "untrained"}, config, tokenizer, template=template) as run:
        weights.save(run.weights, GPTModel(config).state_dict(), {})
    return path


@pytest.fixture(scope="module")
def corpus(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(base, tmp_path_factory.mktemp("corpus"))


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


def losses(run: Path) -> list[float]:
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [e["val_loss"] for e in events if e["event"] == "val"]


@pytest.mark.parametrize("kind", KINDS)
def test_continues_and_resumes_bit_exactly(kind, base, corpus, tmp_path):
    """Another corpus is learned; a run that was killed ends as one that was not."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(argv(base, corpus, whole, *KINDS[kind])) == 0
    found = losses(whole)
    assert found[-1] < (0.98 if kind == "lora" else 0.8) * found[0]
    assert (whole / "adapter").is_dir() == (kind == "lora")
    assert cli.main(["evaluate", str(whole)]) == 0  # its own corpus is the default

    words = argv(base, corpus, killed, *KINDS[kind])
    process = subprocess.Popen(
        [sys.executable, "-m", "gptsmith", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit:
        steps = checkpoint.steps(killed / "checkpoints")
        if steps and steps[-1] >= 10:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < checkpoint.steps(killed / "checkpoints")[-1] < 40
    assert cli.main([*words, "--resume"]) == 0
    one, two = (Run.open(run).load_model().state_dict() for run in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_chat_model_keeps_its_template(tmp_path):
    tokenizer = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
    base = made(tmp_path / "base", tokenizer, TEMPLATE)
    corpus = prepared(base, tmp_path)
    assert cli.main(argv(base, corpus, tmp_path / "run")) == 0
    assert Run.open(tmp_path / "run").template == TEMPLATE


def test_positions_that_see_their_target_are_masked(tmp_path, monkeypatch):
    base = made(tmp_path / "base", Tokenizer.byte(), None, mask="prefix(8)")
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


def test_user_errors(base, corpus, tmp_path, capsys):
    def refused(*words: object) -> str:
        assert cli.main(["finetune", "text", *map(str, words), *COMMON]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    start = ("--from", base, "--data", corpus, "--out", out)
    assert "more than the model's 64" in refused(*start, "--context-length", "65")
    assert "leaves nothing to train" in refused(*start, "--freeze", "*")
    assert "no prepared corpus" in refused("--from", base, "--data", tmp_path / "x", "--out", out)
    folder = tmp_path / "other"
    folder.mkdir()
    other = prepared(made(folder / "run", Tokenizer.char(["0123456789 .plusi"]), None), folder)
    message = refused("--from", base, "--data", other, "--out", out)
    assert f"prepare it again with --tokenizer {base}" in message
    assert not out.exists()

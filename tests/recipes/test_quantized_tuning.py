"""`finetune --quantize` by the real command. Killed and resumed: tests/recipes/test_chat.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import TRAINING, on, scale
from runs import assert_same_checkpoints, assert_same_weights, events, losses, write_inputs
from safetensors import safe_open

from gptsmith import cli
from gptsmith.model import flops
from gptsmith.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = ["--lora.rank", "4", "--train.activation-checkpointing"]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)


def test_loss_is_within_a_hundredth_of_that_of_lora(corpus: Path, inputs: None) -> None:
    """And the run that is opened is the model that was evaluated while it was trained: its weights
    are the quantized ones with the adapters merged."""
    size = ["--model.n-layer", "2", "--model.n-embd", "64", "--model.context-length", "64"]
    words = ["pretrain", "--data", str(corpus), "--out", "base", *TRAINING, *size]
    assert cli.main([*words, "--model.n-head", "2", "--train.steps", "100"]) == 0
    assert cli.main(["prepare", "text.txt", "--tokenizer", "base", "--out", "other"]) == 0
    found = {}
    for format in ("none", "nf4"):
        words = ["finetune", "text", "--from", "base", "--data", "other", "--out", format]
        words += [*TRAINING, *LORA, "--quantize", format, "--eval.interval", "120"]
        assert cli.main([*words, "--train.steps", "120"]) == 0
        found[format] = [event["val_loss"] for event in events(Path(format), "val")]
    plain, quantized = found["none"], found["nf4"]
    assert quantized[0] != plain[0]  # it is another model
    assert plain[-1] < 0.5 * plain[0]
    assert quantized[-1] == pytest.approx(plain[-1], rel=0.01)
    assert cli.main(["evaluate", "nf4", "--precision", "fp32", "--out", "scores.json"]) == 0
    scores = json.loads(Path("scores.json").read_text())["perplexity"]
    assert scores["val_loss"] == pytest.approx(quantized[-1], abs=1e-4)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_classifier_is_trained_and_opened(
    format: str, base: Path, inputs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "classify", "--from", str(base), "--data", "rows.csv", "--out", "out"]
    assert cli.main([*words, *TRAINING, *LORA, "--quantize", format]) == 0
    run = Run.open("out")
    with safe_open(run.path / "base.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stored["blocks.0.mlp.down.codes"].dtype == torch.uint8
    sizes = sum(tensor.nbytes for tensor in stored.values())
    assert sizes == pytest.approx(
        flops.weight_bytes(run.model_config, run.tuning.quantize), rel=0.01
    )
    base_model, tuned = run.base_model(), run.load_model()
    assert [*base_model.state_dict()] == [*tuned.state_dict()]
    assert cli.main(["inspect", "out"]) == 0
    assert f"blocks in {format}" in capsys.readouterr().out
    report = (run.path / "report.md").read_text()
    assert f"blocks in {format}" in report


def test_user_errors(base: Path, inputs: None, user_error: Callable[..., str]) -> None:
    start = ["finetune", "chat", "--from", base, "--data", "chat.jsonl", "--out", "out"]
    assert "quantize nf4 is for adapters" in user_error(*start, "--quantize", "nf4")
    more = [*start, "--quantize", "int8", "--lora.rank", "2"]
    assert "quantize int8 and train.shard" in user_error(*more, "--train.shard")
    assert "quantize int8 and train.precision fp8" in user_error(*more, "--train.precision", "fp8")
    assert "nf4" in user_error(*start, "--quantize", "int3", "--lora.rank", "2")
    assert not Path("out").exists()


@scale
def test_two_ranks_tune_as_one_process_does(base: Path, inputs: None) -> None:
    words = ["finetune", "chat", "--from", str(base), "--data", "chat.jsonl", *TRAINING, *LORA]
    words += ["--quantize", "nf4", "--train.total-batch-tokens", "256", "--lora.dropout", "0.1"]
    on(1, [*words, "--out", "one"])
    on(2, [*words, "--out", "two"])
    assert losses(Path("one")) == losses(Path("two"))
    assert_same_checkpoints(Path("one"), Path("two"))
    assert_same_weights(Path("one"), Path("two"))

"""`--dtype`: weights that are converted when they are loaded."""

import json
from pathlib import Path

import pytest
import torch
from chats import BYTES
from runs import random_run

from gptsmith.chat_template.template import TEMPLATE
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run
from gptsmith.serve.options import ServeOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=32, context_length=64, vocab_size=BYTES.vocab_size
    )
    return random_run(tmp_path_factory.mktemp("dtype") / "chat", config, BYTES, TEMPLATE)


def test_generate_computes_in_it(command, run: Run) -> None:
    words = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "20", "--prompt", "The")
    code, out, err = command("generate", run.path, *words, "--dtype", "bfloat16")
    model = run.load_model().bfloat16()
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    assert (code, err) == (0, "")
    assert out == f"The{Engine(model, run.tokenizer).generate('The', sampling)[0].text}\n"


def test_serve_loads_it(run: Run) -> None:
    options = ServeOptions(run=(run.path,), device="cpu", dtype="bfloat16")
    assert options.load(run).head_weight.dtype == torch.bfloat16
    stored = ServeOptions(run=(run.path,), device="cpu").load(run)
    assert stored.head_weight.dtype == torch.float32


def test_the_draft_model_is_converted_as_well(run: Run) -> None:
    options = ServeOptions(run=(run.path,), draft=run.path, device="cpu", dtype="bfloat16")
    draft = options.load_draft(run)
    assert draft is not None
    assert draft.head_weight.dtype == torch.bfloat16


def test_evaluate_says_what_was_measured(command, run: Run, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("To be, or not to be: that is the question. " * 5)
    words = ("--device", "cpu", "--data", text, "--out", out, "--precision", "fp32")
    found = []
    for more in ((), ("--dtype", "bfloat16")):
        assert command("evaluate", run.path, *words, *more)[0] == 0
        found.append(json.loads(out.read_text())["perplexity"])
    assert "weights" not in found[0]
    assert (found[1]["weights"], found[1]["precision"]) == ("bfloat16", "bfloat16")
    assert found[1]["val_loss"] == pytest.approx(found[0]["val_loss"], rel=0.01)
    assert found[1]["val_loss"] != found[0]["val_loss"]


def test_float16_needs_a_gpu(run: Run, user_error) -> None:
    words = ("--device", "cpu", "--dtype", "float16")
    assert "--dtype float16 is for GPUs" in user_error("generate", run.path, *words)

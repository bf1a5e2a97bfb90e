"""`--quantize`: the commands that take it, and the uses for which it is rejected."""

import json
from pathlib import Path

import pytest
from chats import BYTES
from runs import random_run

import gptsmith
from gptsmith.chat_template.template import TEMPLATE
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.sources import encode_source
from gptsmith.generate.chat import Chat
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.kernels import native
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer

SIZE = dict(n_layer=1, n_head=2, n_embd=32, context_length=256)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)
COMMAND = ("--device", "cpu", "--quantize", "int4")
WORDS = (*COMMAND, "--temperature", "0", "--max-new-tokens", "20")

pytestmark = pytest.mark.skipif(native.kernels("int8") is None, reason="no compiled kernels here")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = ModelConfig(**SIZE, vocab_size=BYTES.vocab_size)
    return random_run(tmp_path_factory.mktemp("quantize") / "chat", config, BYTES, TEMPLATE)


@pytest.fixture(scope="module")
def engine(run: Run) -> Engine:
    return Engine(run.load_model(), run.tokenizer, weights="int4")


def test_generate(command, run: Run, engine: Engine) -> None:
    code, out, err = command("generate", run.path, "--prompt", "The", *WORDS)
    assert (code, err) == (0, "")
    assert out == f"The{engine.generate('The', GREEDY)[0].text}\n"


def test_chat(command, run: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.chat_template is not None
    lines = iter(["Hello"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or _end())
    code, out, _ = command("chat", run.path, *WORDS)
    chat = Chat(engine.model, run.tokenizer, run.chat_template, engine)
    assert (code, out) == (
        0,
        chat.reply([{"role": "user", "content": "Hello"}], GREEDY).text + "\n",
    )


def _end() -> str:
    raise EOFError


def test_evaluate_says_what_was_measured_and_what_cannot_be(run: Run, user_error) -> None:
    loaded = gptsmith.load(run.path, device="cpu", quantize="int4")
    assert loaded.evaluate("skills", per_skill=1)["skills"].conditions["weights"] == "int4"
    found = user_error("evaluate", run.path, *COMMAND, "--tasks", "skills,hellaswag")
    assert "--quantize int4 is for perplexity, skills, gsm8k, not hellaswag" in found
    found = user_error("evaluate", run.path, *COMMAND, "--data", "x", "--precision", "bf16")
    assert "--precision bf16: with --quantize int4 there is no choice" in found


def test_perplexity_is_that_of_the_engine(
    command, run: Run, engine: Engine, tmp_path: Path
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "result.json"
    path.write_text("To be, or not to be: that is the question. " * 5)
    assert command("evaluate", run.path, *COMMAND, "--data", path, "--out", out)[0] == 0
    found = json.loads(out.read_text())["perplexity"]
    assert found["precision"] == "int4"
    stream, _ = encode_source(str(path), run.tokenizer, ReadOptions(), ReadReport("stop"))
    ids = stream.tolist()
    [text] = engine.as_completed([engine.add(Request(ids, GREEDY, prompt_logprobs=0))])
    nats = [-token.logprob for token in text.prompt_logprobs if token is not None]
    assert len(nats) == len(ids) - 1
    assert found["val_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)


def test_serve_rejects_a_classifier(tmp_path: Path, user_error) -> None:
    pytest.importorskip("starlette")
    config = ModelConfig(**SIZE, vocab_size=257, labels=("ham", "spam"))
    path = random_run(tmp_path / "classifier", config, Tokenizer.byte()).path
    assert "is for text, and" in user_error("serve", path, *COMMAND, "--port", "0")


def test_serve(run: Run, engine: Engine) -> None:
    pytest.importorskip("starlette")
    from gptsmith.serve.served import ServedModel

    served = ServedModel("chat", run, run.load_model(), 8, "int4")
    assert served.engine is not None
    assert served.engine.generate("The", GREEDY)[0].ids == engine.generate("The", GREEDY)[0].ids
    assert served.model.head_weight.is_meta  # in memory once


def test_another_number_of_bits_is_rejected(run: Run, user_error) -> None:
    assert "--quantize: should be 'int8' or 'int4'" in user_error(
        "generate", run.path, "--quantize", "int3"
    )

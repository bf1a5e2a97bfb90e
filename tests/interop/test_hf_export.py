"""Exported runs compute the same in transformers and peft, without custom code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    AXES,
    SMALL,
    TOKENIZER,
    V,
    export,
    export_adapter,
    logits,
    lora_run,
    opened,
)
from runs import imported_run, random_run
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.interop.hf import open_folder
from gptsmith.interop.hf_mapping import transformers_class
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.run import Run, layout
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.formats import SPLITS

# peft of transformers, and of a user of GPT-2 who says nothing of its transposed weights
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("name", AXES)
def test_logits_equal_ours(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**SMALL, **AXES[name]), TOKENIZER)
    export(run, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    wanted = logits(run.load_model())
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-4)
    if name != "qwen2":
        assert type(theirs).__name__ == transformers_class(run.model_config)
    said = capfd.readouterr()
    assert not (said.out + said.err).strip()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_exports(preset: str, tmp_path: Path) -> None:
    assert transformers_class(ModelConfig.preset(preset))
    small = {**SMALL, "n_kv_head": 2 if "n_kv_head" in PRESETS[preset] else 4, "head_dim": 8}
    run = random_run(
        tmp_path / "run", ModelConfig.preset(preset).change(**small, d_ff=48), TOKENIZER
    )
    export(run, tmp_path / "out")
    wanted = logits(run.load_model())
    torch.testing.assert_close(logits(opened(tmp_path / "out")), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "arcee", "llama3", "classifier"])
def test_reimported_export_equals_the_run(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = ModelConfig(**SMALL, **AXES.get(name, {}))
    tokenizer = TOKENIZER.add_special_tokens(CHAT_TOKENS)
    config = config.change(vocab_size=tokenizer.vocab_size, dropout=0.1)
    if name == "classifier":
        config = config.change(labels=("ham", "spam", 'Größe "x"'))
    run = random_run(
        tmp_path / "run", config, tokenizer, None if config.labels else TEMPLATE, dtype
    )
    assert export(run, tmp_path / "out") == []
    found = open_folder(tmp_path / "out")
    assert found.config == config
    assert found.dtype == dtype
    assert found.tokenizer.to_json() == tokenizer.to_json()
    assert found.template == run.template
    again = imported_run(tmp_path / "again", found)
    assert again.weights.read_bytes() == run.weights.read_bytes()


def test_dtype_option(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL)
    run = random_run(tmp_path / "run", config, TOKENIZER)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = tmp_path / str(dtype)
        export(run, out, dtype=dtype)
        assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {dtype}
        assert opened(out).dtype == dtype
    large = run.load_model().state_dict()
    large["blocks.0.mlp.down.weight"][0, 0] = 1e6
    run.write_weights(layout.WEIGHTS, large)
    with pytest.raises(ValueError, match=r"mlp.down.weight has values that float16 cannot hold"):
        export(run, tmp_path / "overflow", dtype=torch.float16)
    assert not [path for path in tmp_path.iterdir() if "overflow" in path.name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(norm="layernorm"), "with norm 'layernorm' .*: Llama, the nearest, has 'rmsnorm'"),
        (dict(mlp="gelu"), "with mlp 'gelu'"),
        (dict(mlp="relu2", qk_norm=True), "with qk_norm True .* Arcee"),
        (dict(qk_norm=True, bias="all"), "with bias 'all' .* Qwen3"),
        (dict(mask="causal() & sliding_window(8)"), "with mask 'causal"),
        (dict(position="learned"), "with position 'learned' .* Llama, the nearest, has 'rope'"),
        (dict(n_embd=30, head_dim=8), "with n_embd 30 .* Llama, the nearest, has 28"),
    ],
)
def test_architecture_without_transformers_class_is_rejected(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**{**SMALL, **fields}), TOKENIZER)
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_vocabulary_padding_is_cut(tmp_path: Path) -> None:
    run = random_run(
        tmp_path / "run",
        ModelConfig(**SMALL | dict(vocab_size=V + 40), tie_embeddings=False),
        TOKENIZER,
    )
    assert export(run, tmp_path / "out") == ["40 rows that pad the vocabulary are left out"]
    theirs = opened(tmp_path / "out")
    assert theirs.config.vocab_size == V
    wanted = logits(run.load_model())[..., :V]
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-4)
    few = random_run(tmp_path / "few", ModelConfig(**SMALL | dict(vocab_size=V - 1)), TOKENIZER)
    with pytest.raises(ValueError, match=f"has {V} ids, but the model has vectors for {V - 1}"):
        export(few, tmp_path / "none")


def test_qwen2_with_qwen2_tokenizer_stays_qwen2(tmp_path: Path) -> None:
    document = json.loads(TOKENIZER.to_json())
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLITS["qwen2"]}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False},
        ],
    }  # fmt: skip
    document["normalizer"] = {"type": "NFC"}
    ours = Tokenizer(json.dumps(document)).add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert ours.kind == "other"
    config = ModelConfig(**SMALL | dict(vocab_size=ours.vocab_size), **AXES["qwen2"])
    run = random_run(tmp_path / "run", config, ours)
    assert export(run, tmp_path / "out") == []
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The fox's 123 dogs\n\n  e\u0301 <|im_end|>\n"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert theirs("<|im_end|>")["input_ids"] == [ours.special_tokens["<|im_end|>"]]
    model = opened(tmp_path / "out")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    torch.testing.assert_close(logits(model), logits(run.load_model()), rtol=0, atol=1e-4)
    assert open_folder(tmp_path / "out").config == config


# What the models do


@pytest.fixture
def chat_run(tmp_path: Path) -> Run:
    tokenizer = TOKENIZER.add_special_tokens(CHAT_TOKENS)
    config = ModelConfig(**SMALL | dict(vocab_size=tokenizer.vocab_size), qk_norm=True)
    return random_run(tmp_path / "run", config, tokenizer, TEMPLATE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_greedy_continuations_match(name: str, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**SMALL, **AXES[name]), TOKENIZER)
    export(run, tmp_path / "out")
    theirs, tokenizer = opened(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The quick brown", return_tensors="pt")
    there = theirs.generate(**prompt, max_new_tokens=16)[0].tolist()
    [here] = Engine(run.load_model(), run.tokenizer).generate(
        "The quick brown", SamplingConfig(temperature=0, max_new_tokens=16)
    )
    assert there[prompt["input_ids"].shape[1] :] == list(here.ids)
    assert len(here.ids) == 16


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "arcee"])
@pytest.mark.parametrize("pads", [False, True])
def test_classifier_reads_last_token_before_padding(name: str, pads: bool, tmp_path: Path) -> None:
    tokenizer = TOKENIZER.add_special_tokens(["<|pad|>"]) if pads else TOKENIZER
    config = ModelConfig(**SMALL | dict(vocab_size=tokenizer.vocab_size), **AXES[name])
    labels = ("ham", "spam", "eggs")
    run = random_run(tmp_path / "run", config.change(labels=labels), tokenizer)
    export(run, tmp_path / "out")
    theirs = opened(tmp_path / "out", AutoModelForSequenceClassification)
    assert theirs.config.id2label == dict(enumerate(labels))
    assert theirs.config.label2id["eggs"] == 2
    texts = ["The fox", "it barks: woof! 0123456789", "dog"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        texts, padding=True, return_tensors="pt"
    )
    ours, lengths = run.load_model(), batch["attention_mask"].sum(1)
    assert isinstance(ours, GPTClassifier)
    assert len(set(lengths.tolist())) == 3
    with torch.no_grad():
        found, wanted = theirs(**batch).logits, ours.logits(batch["input_ids"], lengths)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["base", "chat", "classes", "adapter"])
def test_model_card_code_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = TOKENIZER.add_special_tokens(CHAT_TOKENS if kind == "chat" else [])
    config = ModelConfig(**SMALL | dict(vocab_size=tokenizer.vocab_size, context_length=256))
    config = config.change(labels=("ham", "spam") if kind == "classes" else ())
    if kind == "adapter":
        run = lora_run(tmp_path / "run", config, [])
    else:
        run = random_run(tmp_path / "run", config, tokenizer, TEMPLATE if kind == "chat" else None)
    (export_adapter if kind == "adapter" else export)(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    assert bool(capsys.readouterr().out.strip()) == (kind != "adapter")


# All or nothing

KILLED = """
import os, signal, sys
from gptsmith.commands import export
from gptsmith.interop import model_card
model_card.text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # after the weights
export.main(sys.argv[1:])
"""


def test_killed_export_leaves_no_partial_folder(chat_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "exports" / "out"
    words = [str(chat_run.path), "--format", "hf", "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = os.listdir(out.parent)
    assert left.startswith(".out.tmp-")
    assert (out.parent / left / "model.safetensors").is_file()
    export(chat_run, out)
    assert os.listdir(out.parent) == ["out"]
    assert opened(out)

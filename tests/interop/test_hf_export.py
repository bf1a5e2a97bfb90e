"""Exported runs compute the same in transformers and peft, without custom code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from random_weights import add_noise
from runs import imported_run, random_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    logging,
)

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.commands.export import ExportOptions, exportable
from gptsmith.commands.export import export as export_run
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.interop import hf
from gptsmith.interop import peft as adapters
from gptsmith.interop.hf import open_folder
from gptsmith.interop.hf_mapping import transformers_class
from gptsmith.interop.peft import Adapter
from gptsmith.interop.sources import open_source
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import PRESETS, ModelConfig, RopeScaling
from gptsmith.model.lora import LoraConfig, attach
from gptsmith.model.tuning import Tuning, trainable_state_dict
from gptsmith.run import Run, Which, layout
from gptsmith.run.create import open_for_training
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.formats import SPLITS
from gptsmith.train import checkpoint as checkpoints

# peft of transformers, and of a user of GPT-2 who says nothing of its transposed weights
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TEXT = "The quick brown fox jumps over the lazy dog; it barks: woof! 0123456789\n"
TOKENIZER = Tokenizer.train_bpe([TEXT * 3], 280)
V, T = TOKENIZER.vocab_size, 64
IDS = torch.randint(0, V - 1, (3, 12), generator=torch.Generator().manual_seed(1))
SMALL = dict(n_layer=2, n_head=4, n_embd=32, context_length=T, vocab_size=V)
LLAMA3 = RopeScaling(rope_type="llama3", factor=4, original_max_position_embeddings=16)
AXES: dict[str, dict[str, Any]] = {
    "gpt2": dict(norm="layernorm", mlp="gelu", position="learned", bias="all"),
    "gpt2 untied": dict(
        norm="layernorm", mlp="gelu", position="learned", bias="all", tie_embeddings=False
    ),
    "gpt2 erf": dict(norm="layernorm", mlp="gelu_erf", position="learned", bias="all"),
    "llama": dict(n_kv_head=2, tie_embeddings=False),
    "llama tied": dict(norm_eps=1e-6, rope_theta=500.0),
    "llama biased": dict(bias="all", n_kv_head=1),
    "llama linear": dict(rope_scaling=RopeScaling(rope_type="linear", factor=2)),
    "llama3": dict(rope_scaling=LLAMA3, rope_theta=100.0),
    "llama wide heads": dict(head_dim=16, tie_embeddings=False),
    "qwen2": dict(bias="qkv", n_kv_head=2),
    "qwen3": dict(qk_norm=True, head_dim=16, n_kv_head=2, tie_embeddings=False),
    "arcee": dict(mlp="relu2", n_kv_head=2),
}


def export(run: Run, out: Path, dtype: torch.dtype | None = None) -> list[str]:
    return hf.export(exportable(run), out, dtype)


def export_adapter(run: Run, out: Path, checkpoint: Which = "last") -> None:
    hf.export_adapter(exportable(run, base=True), run.load_adapter(checkpoint), out)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return getattr(out := model(ids), "logits", out)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def opened(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """The model of transformers; every tensor must have been used."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


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


# Adapters


def save_adapter(run: Run, tensors: dict[str, Tensor], step: int) -> None:
    folder, header = run.path / layout.ADAPTER, {"which": "last", "step": str(step)}
    folder.mkdir(exist_ok=True)
    adapter = Adapter(run.tuning.lora, tensors, run.tuning.token_ids)
    adapters.save(folder, run.model_config, adapter, header)


def lora_run(path: Path, config: ModelConfig, new: list[str]) -> Run:
    tokenizer = TOKENIZER.add_special_tokens(new)
    config = config.change(vocab_size=tokenizer.vocab_size + 3)
    ids = tuple(tokenizer.special_tokens[name] for name in new)
    tuned = Tuning(lora=LoraConfig(rank=3, alpha=6), token_ids=ids)
    base = random_run(path.with_name("base of it"), config, tokenizer).load_model()
    template = TEMPLATE if new else None
    tensors = {name: t.clone() for name, t in base.state_dict().items()}
    run = open_for_training(
        path, {}, config, tokenizer, tuning=tuned, base=tensors, template=template
    )
    attach(base, tuned.lora, ids)
    torch.manual_seed(5)
    add_noise(base, 0.2)
    save_adapter(run, trainable_state_dict(base), step=1)
    run.close()
    return run


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_adapter_opens_in_peft(name: str, tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL, **AXES[name]), list(CHAT_TOKENS))
    real = run.tokenizer.vocab_size
    ids = torch.cat([IDS, torch.arange(real - 5, real).expand(3, 5)], dim=1)  # new tokens as well
    wanted = logits(run.load_model(), ids)[..., :real]
    export(run, tmp_path / "merged")
    export_adapter(run, tmp_path / "out")
    plain = logits(opened(tmp_path / "out" / "base"), ids)
    assert (plain - wanted).abs().max() > 0.5
    for theirs in (
        opened(tmp_path / "merged"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval(),
        peft.PeftModel.from_pretrained(opened(tmp_path / "out" / "base"), tmp_path / "out").eval(),
    ):
        torch.testing.assert_close(logits(theirs, ids), wanted, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == real
    assert tokenizer.chat_template == TEMPLATE


def test_classifier_adapter_opens_in_peft(tmp_path: Path) -> None:
    labels = ("ham", "spam")
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL, **AXES["gpt2"], labels=labels), [])
    export_adapter(run, tmp_path / "out")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=2
    ).eval()
    ours = run.load_model()
    assert isinstance(ours, GPTClassifier)
    with torch.no_grad():
        wanted = ours.logits(IDS, torch.full((3,), IDS.shape[1]))
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [(), ("ham", "spam")])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_an_exported_adapter_is_imported_merged(
    name: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    tokens = [] if labels else list(CHAT_TOKENS)
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL, **AXES[name], labels=labels), tokens)
    export_adapter(run, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")  # the base is named by its absolute path
    found = open_source(str(tmp_path / "moved"))
    again = imported_run(tmp_path / "again", found)
    assert found.notes[-1].startswith("the adapter (rank ")
    assert again.template == run.template
    assert again.tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT)
    ours, theirs = run.load_model(), again.load_model()
    assert theirs.config.labels == labels
    V = run.tokenizer.vocab_size  # rows that pad the vocabulary are not exported
    for name, tensor in theirs.state_dict().items():
        whole = ours.state_dict()[name]
        assert torch.equal(tensor, whole[:V] if whole.shape != tensor.shape else whole), name


def test_an_adapter_of_peft_is_imported(tmp_path: Path) -> None:
    """Its base is named by a path, its tokenizer is the base's."""
    run = random_run(tmp_path / "run", ModelConfig(**SMALL, **AXES["llama"]), TOKENIZER)
    export(run, tmp_path / "base")
    tuned = peft.get_peft_model(
        opened(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    ).eval()
    torch.manual_seed(3)
    add_noise(tuned, 0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    again = imported_run(tmp_path / "again", open_source(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(again.load_model()), logits(tuned), rtol=0, atol=1e-4)
    assert again.config["adapter_of"] == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"is an adapter, its base is not here: .*base: "):
        open_source(str(tmp_path / "adapter"))


def test_adapter_of_a_checkpoint(tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", ModelConfig(**SMALL), [])
    ours = dict(run.load_adapter().tensors)
    earlier = {name: tensor / 2 for name, tensor in ours.items()}
    checkpoints.save(run.checkpoints, 1, {"model": earlier}, {})
    save_adapter(run, ours, step=2)  # after that checkpoint
    last = load_file(run.weights)
    export_adapter(run, tmp_path / "last")
    export_adapter(run, tmp_path / "one", checkpoint=1)
    wanted = {"last": last, "one": {name: tensor / 2 for name, tensor in last.items()}}
    for name, tensors in wanted.items():
        stored = load_file(tmp_path / name / adapters.WEIGHTS)
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[key], tensors[key]) for key in stored)
    run.weights.unlink()  # stopped in training
    options = ExportOptions(run=run.path, out=tmp_path / "un", format="hf", adapter=True)
    assert "is unfinished: this is its step 1" in export_run(run, options)[0]


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

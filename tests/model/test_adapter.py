"""Adapters between us and peft: each side opens what the other wrote and computes the same."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptsmith.model.adapter import attach_peft, from_peft, to_peft
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import LoraConfig, attach, merge
from gptsmith.model.stock import stock_class
from gptsmith.model.tuning import trainable_state_dict

# peft of transformers, and of a user of GPT-2 who says nothing of its transposed weights
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
)

V = 97
IDS = torch.randint(1, V, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.full((3,), 12)
NEW = [95, 4, 60]
LABELS = ("ham", "spam")

Stock = Callable[..., Any]  # the fixture of conftest.py
Adapter = tuple[dict[str, Tensor], dict[str, Any]]


def randomize(model: nn.Module) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))


def outputs(model: GPTModel) -> Tensor:
    return model.logits(IDS, LENGTHS) if model.config.labels else model(IDS)  # type: ignore


def write(folder: Path, adapter: Adapter) -> Path:
    save_file(adapter[0], folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter[1]))
    return folder


def read(folder: Path) -> Adapter:
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def by_peft(theirs: Any, folder: Path, targets: list[str], **fields: Any) -> tuple[Tensor, Adapter]:
    """Logits under a random adapter that peft made over this model, and what it saved of it."""
    tuned = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **fields)
    ).eval()
    randomize(tuned)
    tuned.save_pretrained(folder)
    return tuned(IDS).logits, read(folder)


@pytest.mark.parametrize(
    ("case", "targets", "token_ids", "labels"),
    [
        ("gpt2", (), NEW, ()),
        ("gpt2", ("down",), [], ()),  # c_proj is the name of two layers
        ("llama", ("qkv", "gate_up"), NEW, ()),
        ("qwen3", (), NEW, ()),
        ("qwen2", ("proj",), [], ()),
        ("arcee", (), [], ()),
        ("gpt2", (), NEW, LABELS),
        ("qwen3", ("qkv",), [], LABELS),
    ],
)
def test_peft_opens_ours(
    case: str,
    targets: tuple[str, ...],
    token_ids: list[int],
    labels: tuple[str, ...],
    stock: Stock,
    tmp_path: Path,
) -> None:
    pair = stock(case, labels)
    ours, lora = pair.ours, LoraConfig(rank=4, alpha=10, targets=targets)
    plain = outputs(ours)
    attach(ours, lora, token_ids)
    randomize(ours)
    saved = write(tmp_path, to_peft(ours.config, lora, trainable_state_dict(ours), token_ids))
    assert (outputs(ours) - plain).abs().max() > 0.5
    theirs = peft.PeftModel.from_pretrained(pair.theirs, str(saved)).eval()
    torch.testing.assert_close(theirs(IDS).logits, outputs(ours), rtol=1e-4, atol=1e-4)
    # And what was written is read back as it was.
    again, tensors, ids = from_peft(ours.config, *read(saved))
    assert (again, ids) == (lora, token_ids)
    expected = trainable_state_dict(ours)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("case", "targets", "fields", "rank"),
    [
        ("gpt2", ["c_attn"], {}, 3),
        ("gpt2", ["c_attn", "c_proj", "c_fc"], dict(trainable_token_indices=NEW), 3),
        ("llama", ALL, {}, 9),
        ("llama", QV, {}, 6),
        ("llama", ["k_proj"], dict(layers_to_transform=[1]), 3),
        ("llama", ["up_proj"], dict(trainable_token_indices=NEW), 3),  # the embedding's alone
        ("llama", QV, dict(trainable_token_indices=dict(embed_tokens=NEW, lm_head=NEW)), 6),
        ("qwen3", [*ALL[3:], "v_proj"], dict(trainable_token_indices=NEW), 6),
        ("qwen2", "all-linear", {}, 9),
        ("llama biased", ["q_proj", "gate_proj"], {}, 3),
    ],
)
def test_we_open_pefts(
    case: str, targets: Any, fields: dict[str, Any], rank: int, stock: Stock, tmp_path: Path
) -> None:
    pair = stock(case)
    plain = outputs(pair.ours)
    expected, adapter = by_peft(pair.theirs, tmp_path, targets, task_type="CAUSAL_LM", **fields)
    assert (expected - plain).abs().max() > 0.5
    lora, token_ids = attach_peft(pair.ours, *adapter, "there")
    assert (lora.rank, lora.alpha) == (rank, 2 * rank)  # the scale is still 6 / 3
    assert token_ids == (NEW if "trainable_token_indices" in fields else [])
    torch.testing.assert_close(outputs(pair.ours), expected, rtol=1e-4, atol=1e-4)
    merge(pair.ours)
    torch.testing.assert_close(outputs(pair.ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_we_open_pefts_classifier(case: str, stock: Stock, tmp_path: Path) -> None:
    pair = stock(case, LABELS)
    targets = ["c_attn"] if case == "gpt2" else QV
    expected, adapter = by_peft(pair.theirs, tmp_path, targets, task_type="SEQ_CLS")
    attach_peft(pair.ours, *adapter, "there")
    torch.testing.assert_close(outputs(pair.ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token_ids", [[], NEW])
def test_where_there_is_no_stock_class_our_own_names_serve(
    token_ids: list[int], tmp_path: Path
) -> None:
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, vocab_size=V, context_length=16, mlp="relu2",
        tie_embeddings=False, qk_norm=True, mask="causal() & sliding_window(4)",
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    base = GPTModel(config).eval()
    base.load_state_dict(model.state_dict())
    lora = LoraConfig(rank=2)
    attach(model, lora, token_ids)
    randomize(model)
    saved = write(tmp_path, to_peft(config, lora, trainable_state_dict(model), token_ids))
    _, adapter = read(saved)
    assert adapter["auto_mapping"]["base_model_class"] == "GPTModel"
    if not token_ids:  # of peft, rows of tokens ask for a configuration of transformers
        theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(saved)).eval()
        torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert attach_peft(base, *read(saved), saved) == (lora, token_ids)
    assert torch.equal(base(IDS), model(IDS))


def test_the_stock_class_of_every_preset_and_the_axis_that_has_none() -> None:
    classes = {name: stock_class(ModelConfig(**fields)) for name, fields in PRESETS.items()}
    gpt2 = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "tiny", "nano"}
    assert {name for name, stock in classes.items() if stock == "GPT2LMHeadModel"} == gpt2
    assert {name: stock for name, stock in classes.items() if name not in gpt2} == {
        "smollm2-135m": "LlamaForCausalLM",
        "course": "LlamaForCausalLM",
        "qwen3-0.6b": "Qwen3ForCausalLM",
        "fast": "Qwen3ForCausalLM",
    }
    fast, tiny = ModelConfig.preset("fast"), ModelConfig.preset("tiny")
    assert stock_class(tiny.change(labels=LABELS)) == "GPT2ForSequenceClassification"
    for config, words in [
        (fast.change(mask="prefix(3)"), r"mask 'prefix\(3\)' .*: Qwen3, the nearest, has 'causal"),
        (fast.change(mlp="gelu"), "mlp 'gelu' .*: Qwen3, the nearest, has 'swiglu'"),
        (fast.change(norm="layernorm"), "norm 'layernorm'"),
        (fast.change(bias="all"), "bias 'all' .* has 'none'"),
        (tiny.change(n_kv_head=2), "n_kv_head 2 .*: GPT2, the nearest, has 4"),
        (tiny.change(bias="none"), "bias 'none' .* has 'all'"),
    ]:
        with pytest.raises(ValueError, match=f"no stock class of transformers has {words}"):
            stock_class(config)


QWEN3 = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, vocab_size=V, context_length=16, qk_norm=True
)  # fmt: skip


@pytest.fixture
def adapter() -> Adapter:
    model, lora = GPTModel(QWEN3), LoraConfig(rank=2)
    attach(model, lora, NEW)
    return to_peft(QWEN3, lora, trainable_state_dict(model), NEW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", True), ("use_dora", True), ("bias", "lora_only"), ("peft_type", "LOHA"),
        ("modules_to_save", ["lm_head"]), ("modules_to_save", ["score"]),
        ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
        ("init_lora_weights", "pissa_niter_4"), ("layer_replication", [[0, 2]]),
        ("r", None), ("lora_alpha", "8"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_by_its_field(
    adapter: Adapter, field: str, value: object
) -> None:
    tensors, config = adapter
    with pytest.raises(ValueError, match=rf"adapter_config\.json has {field} .*only plain LoRA"):
        from_peft(QWEN3, tensors, {**config, field: value})


def test_tensors_that_do_not_belong_are_named(adapter: Adapter) -> None:
    tensors, config = adapter
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    here = "layer 1, self_attn.q_proj"
    for key, tensor, words in [
        ("base_model.model.lm_head.lora_A.weight", torch.ones(2, 16), "lm_head.lora_A has no"),
        (name.format("magnitude_vector"), torch.ones(16), "magnitude_vector has no place"),
        (name.format("B").replace(".1.", ".2."), torch.ones(16, 2), "in a model of 2 layers"),
        (name.format("A"), torch.ones(2, 15), f"{here}: A is (2, 15) and B (16, 2)"),
        (name.format("A"), torch.ones(3, 16), f"{here}: A is (3, 16)"),
        (name.format("A"), torch.full((2, 16), torch.nan), "q_proj.lora_A.weight holds NaN"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            from_peft(QWEN3, {**tensors, key: tensor}, config)
    without = {k: t for k, t in tensors.items() if k != name.format("B")}
    with pytest.raises(ValueError, match=f"{here}: .* B None, .* or incomplete"):
        from_peft(QWEN3, without, config)
    with pytest.raises(ValueError, match="no LoRA matrices"):
        from_peft(QWEN3, {}, config)
    rows = "base_model.model.{}.token_adapter.trainable_tokens_delta"  # of a head that is tied
    other = {**tensors, rows.format("lm_head"): tensors[rows.format("model.embed_tokens")]}
    with pytest.raises(ValueError, match=r"there does not fit .*: head\.rows does not belong"):
        attach_peft(GPTModel(QWEN3), other, config, "there")


@pytest.mark.parametrize("ids", [[1, 2], {"embed_tokens": [1, 2, 3], "lm_head": [1, 2, 4]}, None])
def test_trained_rows_need_their_ids(adapter: Adapter, ids: object) -> None:
    tensors, config = adapter
    with pytest.raises(ValueError, match=r"adapter_config\.json has trainable_token_indices"):
        from_peft(QWEN3, tensors, {**config, "trainable_token_indices": ids})

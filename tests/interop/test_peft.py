"""Adapters: peft opens ours, we open peft's, and both compute the same."""

import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_models import V, transformers_model
from hf_models import save as save_model
from random_weights import add_noise
from runs import imported_model
from torch import Tensor

from gptsmith.interop.hf import open_folder
from gptsmith.interop.peft import Adapter, attach_adapter, from_peft, load, save, to_peft
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import LoraConfig, attach, merge
from gptsmith.model.tuning import trainable_state_dict

# of peft in transformers, and of peft with GPT-2's transposed weights
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
)

IDS = torch.randint(0, V - 1, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.full((3,), 12)
NEW = [61, 4, 60]

Files = tuple[dict[str, Tensor], dict[str, Any]]  # peft's two, parsed


def pair(case: str, folder: Path, labels: int = 0) -> tuple[Any, GPTModel]:
    """A model of transformers and ours, with the same weights."""
    theirs = transformers_model(case, labels)
    return theirs, imported_model(open_folder(save_model(theirs, folder / "model")))


def outputs(model: GPTModel) -> Tensor:
    return model.logits(IDS, LENGTHS) if model.config.labels else model(IDS)  # type: ignore


def by_peft(theirs: Any, folder: Path, targets: list[str], **fields: Any) -> Tensor:
    """Logits under a random adapter that peft makes over this model and saves to `folder`."""
    tuned = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **fields)
    ).eval()
    add_noise(tuned, 0.2)
    tuned.save_pretrained(folder)
    return tuned(IDS).logits


@pytest.mark.parametrize(
    ("case", "targets", "token_ids", "labels"),
    [
        ("gpt2", (), NEW, 0),
        ("gpt2", ("down",), [], 0),  # c_proj is the name of two layers
        ("llama", ("qkv", "gate_up"), NEW, 0),
        ("qwen3 tied", (), NEW, 0),
        ("qwen2", ("proj",), [], 0),
        ("arcee", (), [], 0),
        ("gpt2", (), NEW, 2),
        ("qwen3 tied", ("qkv",), [], 2),
    ],
)
def test_peft_opens_ours(
    case: str,
    targets: tuple[str, ...],
    token_ids: list[int],
    labels: int,
    tmp_path: Path,
) -> None:
    base, ours = pair(case, tmp_path, labels)
    lora = LoraConfig(rank=4, alpha=10, targets=targets)
    plain = outputs(ours)
    attach(ours, lora, token_ids)
    add_noise(ours, 0.2)
    adapter = Adapter(lora, trainable_state_dict(ours), token_ids)
    save(tmp_path, ours.config, adapter)
    assert (outputs(ours) - plain).abs().max() > 0.5
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(theirs(IDS).logits, outputs(ours), rtol=1e-4, atol=1e-4)
    # And what was written is read back as it was.
    again = load(tmp_path, ours.config)
    assert (again.lora, again.token_ids) == (lora, token_ids)
    assert again.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


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
        ("qwen3 tied", [*ALL[3:], "v_proj"], dict(trainable_token_indices=NEW), 6),
        ("qwen2", "all-linear", {}, 9),
        ("llama biased", ["q_proj", "gate_proj"], {}, 3),
    ],
)
def test_we_open_adapters_of_peft(
    case: str, targets: Any, fields: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    theirs, ours = pair(case, tmp_path)
    plain = outputs(ours)
    expected = by_peft(theirs, tmp_path, targets, task_type="CAUSAL_LM", **fields)
    assert (expected - plain).abs().max() > 0.5
    adapter = load(tmp_path, ours.config)
    attach_adapter(ours, adapter, "there")
    assert (adapter.lora.rank, adapter.lora.alpha) == (rank, 2 * rank)  # the scale is still 6 / 3
    assert adapter.token_ids == (NEW if "trainable_token_indices" in fields else [])
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-4, atol=1e-4)
    merge(ours)
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_we_open_a_classifier_adapter_of_peft(case: str, tmp_path: Path) -> None:
    theirs, ours = pair(case, tmp_path, labels=2)
    targets = ["c_attn"] if case == "gpt2" else QV
    expected = by_peft(theirs, tmp_path, targets, task_type="SEQ_CLS")
    attach_adapter(ours, load(tmp_path, ours.config), "there")
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token_ids", [[], NEW])
def test_without_transformers_class_our_names_are_used(
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
    add_noise(model, 0.2)
    save(tmp_path, config, Adapter(lora, trainable_state_dict(model), token_ids))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["auto_mapping"]["base_model_class"] == "GPTModel"
    if not token_ids:  # with rows of tokens, peft needs a configuration of transformers
        theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
        torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    again = load(tmp_path, config)
    assert (again.lora, again.token_ids) == (lora, token_ids)
    attach_adapter(base, again, "there")
    assert torch.equal(base(IDS), model(IDS))


QWEN3 = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, vocab_size=V, context_length=16, qk_norm=True
)  # fmt: skip


@pytest.fixture
def adapter() -> Files:
    model, lora = GPTModel(QWEN3), LoraConfig(rank=2)
    attach(model, lora, NEW)
    return to_peft(QWEN3, Adapter(lora, trainable_state_dict(model), NEW))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", True), ("use_dora", True), ("bias", "lora_only"), ("peft_type", "LOHA"),
        ("modules_to_save", ["lm_head"]), ("modules_to_save", ["score"]),
        ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
        ("init_lora_weights", "pissa_niter_4"), ("layer_replication", [[0, 2]]),
        ("r", None), ("lora_alpha", "8"), ("r", 0), ("r", 1.5), ("r", [2]),
        ("lora_alpha", math.inf),
        ("auto_mapping", "x"), ("auto_mapping", ["x"]), ("modules_to_save", [{}]),
        ("trainable_token_indices", 5), ("trainable_token_indices", {"a": ["x"]}),
        ("lora_dropout", "0.1"), ("lora_dropout", -1), ("init_lora_weights", [1]),
    ],
)  # fmt: skip
def test_other_adapters_than_plain_lora_are_rejected(
    adapter: Files, field: str, value: object
) -> None:
    tensors, config = adapter
    with pytest.raises(ValueError, match=rf"adapter_config\.json has {field} .*only plain LoRA"):
        from_peft(QWEN3, tensors, {**config, field: value})


def test_unexpected_tensors_are_rejected(adapter: Files) -> None:
    tensors, config = adapter
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    here = "model.layers.1.self_attn.q_proj"
    for key, tensor, words in [
        (
            "base_model.model.lm_head.lora_A.weight",
            torch.ones(2, 16),
            "lm_head.lora_A does not belong",
        ),
        (name.format("magnitude_vector"), torch.ones(16), "magnitude_vector does not belong"),
        (name.format("B").replace(".1.", ".2."), torch.ones(16, 2), "to a model of 2 layers"),
        (name.format("A"), torch.ones(2, 15), f"{here}: A is (2, 15) and B (16, 2)"),
        (name.format("A"), torch.ones(3, 16), f"{here}: A is (3, 16)"),
        (name.format("A"), torch.full((2, 16), torch.nan), "q_proj.lora_A.weight contains NaN"),
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
    with pytest.raises(ValueError, match=r"there does not fit .*: head\.rows is unexpected"):
        attach_adapter(GPTModel(QWEN3), from_peft(QWEN3, other, config), "there")


@pytest.mark.parametrize("ids", [[1, 2], {"embed_tokens": [1, 2, 3], "lm_head": [1, 2, 4]}, None])
def test_trained_rows_need_one_list_of_ids(adapter: Files, ids: object) -> None:
    tensors, config = adapter
    with pytest.raises(ValueError, match=r"adapter_config\.json has trainable_token_indices"):
        from_peft(QWEN3, tensors, {**config, "trainable_token_indices": ids})

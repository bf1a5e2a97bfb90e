"""Folders of transformers become runs that compute the same; unsupported ones are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, TOKENIZER, T, V, save, transformers_model
from runs import imported_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptsmith.interop.hf import open_folder
from gptsmith.model.classifier import GPTClassifier
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer

IDS = torch.randint(0, V - 1, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([12, 12, 12])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(model, GPTClassifier):
            return model.logits(IDS, LENGTHS)
        return getattr(out := model(IDS), "logits", out)


def from_weights(folder: Path, path: Path) -> Run:
    return imported_run(path, open_folder(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(transformers_model("llama"), tmp_path / "model")


def edit(folder: Path, **fields: Any) -> Path:
    """Change config.json; None removes a field."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", [0, 2])
def test_logits_equal_theirs(case: str, labels: int, tmp_path: Path) -> None:
    theirs = transformers_model(case, labels)
    expected = logits(theirs)
    assert expected.std() > 0.1
    run = from_weights(save(theirs, tmp_path / "model"), tmp_path / "run")
    torch.testing.assert_close(logits(run.load_model()), expected, rtol=0, atol=1e-4)
    assert run.model_config.labels == ("LABEL_0", "LABEL_1")[:labels]
    assert run.config["class"] == type(theirs).__name__
    assert run.tokenizer.to_json() == TOKENIZER.to_json()


def test_file_layouts(tmp_path: Path) -> None:
    """With and without the prefix, old buffers, a tied head stored twice, shards."""
    theirs = transformers_model("gpt2")
    plain = save(theirs, tmp_path / "plain")
    expected = logits(theirs)

    def old(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, T, T, dtype=torch.uint8)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    sharded = save(theirs, tmp_path / "sharded", max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    for name in ("plain", "sharded", "old"):
        if name == "old":
            rewrite(plain, old).rename(tmp_path / "old")
        run = from_weights(tmp_path / name, tmp_path / f"run {name}")
        torch.testing.assert_close(logits(run.load_model()), expected, rtol=0, atol=1e-4)


def test_tied_head_must_equal_embedding(tmp_path: Path) -> None:
    folder = save(transformers_model("gpt2"), tmp_path / "model")
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.ones(V, 32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        from_weights(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["llama3", "llama linear"])
def test_rope_of_transformers_4(case: str, tmp_path: Path) -> None:
    theirs = transformers_model(case)
    folder = save(theirs, tmp_path / "model")
    new = open_folder(folder).config
    rope = dict(CASES[case][1]["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for key in ("type", "rope_type"):
        edit(folder, rope_parameters=None, rope_theta=theta, rope_scaling={key: kind, **rope})
        assert open_folder(folder).config == new
    assert new.rope_scaling is not None
    assert new.rope_theta == theta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = transformers_model("llama").to(dtype)
    folder = save(theirs, tmp_path / "model")
    run = from_weights(folder, tmp_path / "run")
    stored = load_file(run.weights)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    q, k, v = (theirs.state_dict()[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(stored["blocks.0.attention.qkv.weight"], torch.cat([q, k, v]))
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(32)}))
    assert open_folder(folder).dtype == torch.float32


def test_vocabulary_padding_is_kept(folder: Path, tmp_path: Path) -> None:
    fewer = Tokenizer.char(["abc"])
    fewer.save(folder / "tokenizer.json")
    run = from_weights(folder, tmp_path / "run")
    assert (run.model_config.vocab_size, run.tokenizer.vocab_size) == (V, 4)
    Tokenizer.byte().save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="257 ids, but the model has vectors for 64"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="mixtral"), "model_type 'mixtral'"),
        (dict(architectures=["LlamaForQuestionAnswering"]), "architectures .*QuestionAnswering"),
        (dict(architectures=["Mine"], auto_map={"AutoModel": "m.Mine"}), r"architectures \['Mine"),
        (dict(hidden_act="gelu"), "hidden_act gelu"),
        (dict(quantization_config={"bits": 4}), "quantization_config {'bits': 4}"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling {'rope_type': 'ya"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling {'type': 'dynamic'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": "x"}), "rope_scaling.factor is 'x': "),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(is_causal=False), "is_causal False"),
        (dict(per_layer_config={"0": {}}), "per_layer_config"),
        (dict(hidden_act={"a": 1}), "hidden_act"),
        (dict(hidden_act=["silu"]), "hidden_act"),
        (dict(num_hidden_layers="two"), "num_hidden_layers is 'two': "),
        (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000: should be"),
        (dict(max_position_embeddings=1 << 40), "1099511627776 is too long for the rotary"),
        (dict(hidden_size=10**15, vocab_size=10**15), "impossible sizes"),
        (dict(hidden_size=10**30), "impossible sizes"),
        (dict(hidden_size=64), r"embed_tokens.weight has shape \(64, 32\), expected \(64, 64\)"),
        (dict(attention_bias=True), "self_attn.q_proj.bias is missing"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0: should be greater"),
        (dict(num_key_value_heads=3), r"config\.json: n_head 4 is not a multiple"),
        (dict(attention_dropout=2), "attention_dropout is 2: should be less"),
        (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor is missing"),
        (dict(tie_word_embeddings="perhaps"), "tie_word_embeddings is 'perhaps': "),
        (dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=True,
              max_window_layers=1), "sliding_window 4096"),
        (dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"],
              layer_types=["sliding_attention"] * 2), "layer_types"),
        (dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], layer_types=5),
         "layer_types 5"),
        (dict(architectures=["LlamaForSequenceClassification"],
              problem_type="multi_label_classification"), "problem_type multi_label"),
        (dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "one"}), "one"),
        (dict(model_type="gpt2", architectures=None, scale_attn_by_inverse_layer_idx=True),
         "scale_attn_by_inverse_layer_idx True"),
        (dict(model_type="gpt2", architectures=None, activation_function="relu"),
         "activation_function relu"),
        (dict(model_type="gpt2", architectures=None, add_cross_attention=True), "cross_attention"),
    ],
)  # fmt: skip
def test_unsupported_config_is_rejected(fields: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_folder(edit(folder, **fields))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_custom_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(folder, auto_map={"AutoModelForCausalLM": "evil.Evil"}, attention_dropout=0.1)
    found = open_folder(folder)
    assert any("auto_map" in note for note in found.notes)
    assert any("dropout 0.1" in note for note in found.notes)
    assert found.config.dropout == 0.1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_rejected(value: float, folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.gate_up\.weight contains NaN or infinity"
    ):
        from_weights(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(more=torch.ones(1)), "more is unexpected"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"has shape \(33,\), expected \(32,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_folder(rewrite(folder, change))

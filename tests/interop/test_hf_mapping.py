"""Which class of transformers computes a config, and the table of tensor names."""

import math
from typing import Any

import pytest

from gptsmith.interop.hf_mapping import FAMILIES, tensor_shapes, transformers_class
from gptsmith.model import state_dict
from gptsmith.model.config import PRESETS, ModelConfig

LABELS = ("ham", "spam")


def test_class_of_every_preset_and_axes_without_one() -> None:
    classes = {name: transformers_class(ModelConfig(**fields)) for name, fields in PRESETS.items()}
    gpt2 = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "tiny", "nano"}
    assert {name for name, cls in classes.items() if cls == "GPT2LMHeadModel"} == gpt2
    assert {name: cls for name, cls in classes.items() if name not in gpt2} == {
        "smollm2-135m": "LlamaForCausalLM",
        "course": "LlamaForCausalLM",
        "qwen3-0.6b": "Qwen3ForCausalLM",
        "fast": "Qwen3ForCausalLM",
    }
    fast, tiny = ModelConfig.preset("fast"), ModelConfig.preset("tiny")
    assert transformers_class(tiny.change(labels=LABELS)) == "GPT2ForSequenceClassification"
    for config, words in [
        (fast.change(mask="prefix(3)"), r"mask 'prefix\(3\)' .*: Qwen3, the nearest, has 'causal"),
        (fast.change(mlp="gelu"), "mlp 'gelu' .*: Qwen3, the nearest, has 'swiglu'"),
        (fast.change(norm="layernorm"), "norm 'layernorm'"),
        (fast.change(bias="all"), "bias 'all' .* has 'none'"),
        (tiny.change(n_kv_head=2), "n_kv_head 2 .*: GPT2, the nearest, has 4"),
        (tiny.change(bias="none"), "bias 'none' .* has 'all'"),
    ]:
        with pytest.raises(ValueError, match=f"transformers has no model class with {words}"):
            transformers_class(config)


def test_unknown_value_of_an_axis_is_rejected() -> None:
    """Not exported as the nearest class, even if the config accepts it one day."""
    for axis in ("norm", "mlp", "position", "bias", "qk_norm", "mask"):
        for preset in ("gpt2", "course", "fast"):
            config = ModelConfig.preset(preset).model_copy(update={axis: "third"})
            with pytest.raises(ValueError, match=f"no model class with {axis} 'third'"):
                transformers_class(config)


def test_every_field_of_the_config_is_mapped() -> None:
    """A new field must be an axis, a size, or written by hf_config."""
    elsewhere = {"rope_theta", "rope_scaling", "dropout", "tie_embeddings", "labels"}
    for family in FAMILIES:
        sizes = set(family.sizes.values())
        if family.gpt2:  # d_ff is n_inner; the others are rejected
            sizes |= {"d_ff", "n_kv_head", "head_dim"}
        assert elsewhere | family.axes.keys() | sizes == set(ModelConfig.model_fields)


SMALL: dict[str, Any] = dict(n_layer=12, n_head=4, n_kv_head=4, n_embd=32, head_dim=8, d_ff=48)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("labels", [(), LABELS])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_names_are_unique_and_complete(family: Any, labels: tuple[str, ...], tied: bool) -> None:
    axes = {axis: values[-1] for axis, values in family.axes.items()}
    config = ModelConfig(**SMALL, **axes, tie_embeddings=tied, labels=labels)
    ours, theirs = state_dict.shapes(config), tensor_shapes(config)
    assert transformers_class(config) == family.class_name(bool(labels))
    # the same number of parameters: no two tensors of ours have one name there
    assert sum(map(math.prod, theirs.values())) == sum(map(math.prod, ours.values()))

"""Which transformers classes implement a ModelConfig, and their names for its fields and tensors.

One record per model family (`Family`) holds everything specific to it; a new architecture is a new
record. hf_config.py uses the records to read and write config.json. Sources: the configuration and
modeling files of GPT-2, Llama, Qwen2, Qwen3 and Arcee in transformers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig

# Our module -> the corresponding modules of transformers. Where there are several, their rows are
# stacked in this order in our fused matrix. `*` is the index of the block.
Names = Mapping[str, tuple[str, ...]]

GPT2_NAMES: Names = {
    "embedding.token": ("transformer.wte",),
    "embedding.position": ("transformer.wpe",),
    "blocks.*.attention_norm": ("transformer.h.*.ln_1",),
    "blocks.*.attention.qkv": ("transformer.h.*.attn.c_attn",),
    "blocks.*.attention.proj": ("transformer.h.*.attn.c_proj",),
    "blocks.*.mlp_norm": ("transformer.h.*.ln_2",),
    "blocks.*.mlp.up": ("transformer.h.*.mlp.c_fc",),
    "blocks.*.mlp.down": ("transformer.h.*.mlp.c_proj",),
    "final_norm": ("transformer.ln_f",),
    "head": ("lm_head",),
    "score": ("score",),
}
LLAMA_NAMES: Names = {  # Qwen and Arcee as well
    "embedding.token": ("model.embed_tokens",),
    "blocks.*.attention_norm": ("model.layers.*.input_layernorm",),
    "blocks.*.attention.qkv": (
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "blocks.*.attention.q_norm": ("model.layers.*.self_attn.q_norm",),
    "blocks.*.attention.k_norm": ("model.layers.*.self_attn.k_norm",),
    "blocks.*.attention.proj": ("model.layers.*.self_attn.o_proj",),
    "blocks.*.mlp_norm": ("model.layers.*.post_attention_layernorm",),
    "blocks.*.mlp.gate_up": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "blocks.*.mlp.up": ("model.layers.*.mlp.up_proj",),
    "blocks.*.mlp.down": ("model.layers.*.mlp.down_proj",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
    "score": ("score",),
}

# Sizes: field of config.json -> our field. transformers always writes all of them.
_GPT2_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "context_length",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_eps",
}
_LLAMA_SIZES = {  # those of old models lack n_kv_head and head_dim
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "intermediate_size": "d_ff",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
}


_SILU = ("hidden_act", {"silu": "swiglu", "swish": "swiglu"})
_GELU = (
    "activation_function",
    {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"},
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The classes of transformers that share a model_type."""

    model_type: str
    prefix: str
    """Of the names of its classes."""
    axes: Mapping[str, tuple[Any, ...]]
    """The values of ModelConfig's fields that its classes implement."""
    activation: tuple[str, Mapping[str, str]] = _SILU
    """Field of config.json for the activation; its values as our `mlp`, the default first."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of config.json that change the computation, with the values that are supported."""
    sizes: Mapping[str, str] = field(default_factory=lambda: _LLAMA_SIZES)
    names: Names = field(default_factory=lambda: LLAMA_NAMES)
    gpt2: bool = False
    """Learned positions, as many key/value heads as query heads, and GPT-2's other fields."""
    head_dim_is_free: bool = True
    """Otherwise heads are n_embd / n_head wide."""
    divisible: bool = True
    """n_embd must be a multiple of n_head."""

    def class_name(self, classifier: bool = False) -> str:
        if classifier:
            return f"{self.prefix}ForSequenceClassification"
        return f"{self.prefix}{'LMHeadModel' if self.gpt2 else 'ForCausalLM'}"


def _axes(**changed: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {
        "position": ("rope",), "norm": ("rmsnorm",), "mlp": ("swiglu",), "bias": ("none",),
        "qk_norm": (False,), "mask": ("causal()",), **changed,
    }  # fmt: skip


# If several are equally close to a config that none implements, the error names the first.
FAMILIES = (
    Family(
        model_type="gpt2",
        prefix="GPT2",
        axes=_axes(
            position=("learned",), norm=("layernorm",), mlp=("gelu", "gelu_erf"), bias=("all",)
        ),
        activation=_GELU,
        fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        sizes=_GPT2_SIZES,
        names=GPT2_NAMES,
        gpt2=True,
        head_dim_is_free=False,
    ),
    Family(
        model_type="arcee",
        prefix="Arcee",
        axes=_axes(mlp=("relu2",)),
        activation=("hidden_act", {"relu2": "relu2"}),
        fixed={"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    Family(
        model_type="qwen3",
        prefix="Qwen3",
        axes=_axes(qk_norm=(True,)),
        fixed={"attention_bias": (False,)},
        divisible=False,
    ),
    Family(
        model_type="qwen2",
        prefix="Qwen2",
        axes=_axes(bias=("qkv",)),
        head_dim_is_free=False,
    ),
    Family(model_type="llama", prefix="Llama", axes=_axes(bias=("none", "all"))),
)


# --- classes -------------------------------------------------------------------------------------


def family_of(c: ModelConfig) -> Family:
    """The family whose classes implement this architecture.

    Raises ValueError naming the field on which the nearest family differs.
    """

    def differences(family: Family) -> dict[str, Any]:
        """Our fields that do not match the family -> the values that it supports."""
        fields = dict(family.axes)
        if family.divisible:
            fields["n_embd"] = (c.n_embd // c.n_head * c.n_head,)
        if not family.head_dim_is_free:
            fields["head_dim"] = (c.n_embd // c.n_head,)
        if family.gpt2:
            fields["n_kv_head"] = (c.n_head,)
        return {axis: v for axis, v in fields.items() if getattr(c, axis) not in v}

    def distance(family: Family) -> tuple[int, int]:
        """Differences in architecture count before differences in sizes."""
        axes = len(differences(family).keys() & family.axes.keys())
        return axes, len(differences(family)) - axes

    nearest = min(FAMILIES, key=distance)
    for axis, values in differences(nearest).items():
        raise ValueError(
            f"transformers has no model class with {axis} {getattr(c, axis)!r} and the other "
            f"settings of this model: {nearest.prefix}, the nearest, has "
            f"{' or '.join(map(repr, values))}"
        )
    return nearest


def transformers_class(c: ModelConfig) -> str:
    """The transformers class that implements this architecture; ValueError as from family_of."""
    return family_of(c).class_name(bool(c.labels))


# --- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorLayout:
    """How one of our tensors is stored in a foreign file: one or more named parts, whose rows
    stacked in order are its rows."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False  # each part is (columns, rows)


def tensor_layout(c: ModelConfig, names: Names, ours: str, rows: int) -> TensorLayout:
    """The layout of our tensor `ours`, which has `rows` rows, in a file that uses `names`."""
    module, _, kind = ours.rpartition(".")  # weight, bias, lora_A, ...
    block = re.match(r"blocks\.(\d+)\.", module)
    key = module.replace(block[0], "blocks.*.") if block else module
    parts = tuple(name.replace("*", block[1] if block else "") for name in names[key])
    heights: tuple[int, ...] = (rows,)
    if len(parts) > 1:
        fused = {"qkv": (c.n_head * c.D, c.K * c.D, c.K * c.D), "gate_up": (c.F, c.F)}
        heights = fused[key.rpartition(".")[2]]
    return TensorLayout(tuple(f"{part}.{kind}" for part in parts), heights)


def transformers_layout(c: ModelConfig, ours: str, shape: tuple[int, ...]) -> TensorLayout:
    """`tensor_layout` for the transformers class of `c`."""
    family = family_of(c)
    found = tensor_layout(c, family.names, ours, shape[0])
    # GPT-2's linear layers are convolutions of width 1, with matrices (in, out)
    transposed = family.gpt2 and ours.startswith("blocks.") and len(shape) == 2
    return TensorLayout(found.names, found.rows, transposed)


def gpt2_names(
    c: ModelConfig,
    given: Mapping[str, tuple[int, ...]],
    origin: Path,
    rename: Callable[[str], str] = str,
) -> dict[str, str]:
    """Our parameter names -> those in a GPT-2 file that contains tensors of the shapes `given`.

    rename: from transformers' name to the file's. ValueError naming `origin` unless it holds
    exactly these parameters.
    """
    try:
        shapes = state_dict.shapes(c)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    names = {
        ours: rename(tensor_layout(c, GPT2_NAMES, ours, shape[0]).names[0])
        for ours, shape in shapes.items()
    }
    state_dict.check_state_dict(
        {names[ours]: shape for ours, shape in shapes.items()}, given, origin
    )
    return names


def tensor_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the transformers class of `c`, by its names."""
    shapes = {}
    for ours, shape in state_dict.shapes(c).items():
        layout = transformers_layout(c, ours, shape)
        for name, rows in zip(layout.names, layout.rows, strict=True):
            whole = (rows, *shape[1:])
            shapes[name] = whole[::-1] if layout.transposed else whole
    return shapes

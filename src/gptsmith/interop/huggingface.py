"""config.json of transformers and ModelConfig, both ways; what tensors a stock class has.

Sources: the configuration and modeling files of GPT-2, Llama, Qwen2, Qwen3 and Arcee in
transformers. A field that config.json leaves out has the default of its class.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from gptsmith.interop.external_model import config_error
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.stock import place, stock_class

# model_type -> the beginning of the names of its classes
FAMILIES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "arcee": "Arcee"}

# Their size or number: ours, and its default there.
_GPT2 = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "n_positions": ("context_length", 1024),
    "vocab_size": ("vocab_size", 50257),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
}
_LLAMA = {
    "num_hidden_layers": ("n_layer", 32),
    "num_attention_heads": ("n_head", 32),
    "num_key_value_heads": ("n_kv_head", None),
    "hidden_size": ("n_embd", 4096),
    "intermediate_size": ("d_ff", 11008),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("context_length", 2048),
    "vocab_size": ("vocab_size", 32000),
    "rms_norm_eps": ("norm_eps", 1e-6),
}
_QWEN2 = _LLAMA | {
    "num_key_value_heads": ("n_kv_head", 32),
    "intermediate_size": ("d_ff", 22016),
    "max_position_embeddings": ("context_length", 32768),
    "vocab_size": ("vocab_size", 151936),
}
_SIZES: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": ("head_dim", 128)},
    "arcee": _LLAMA
    | {
        "hidden_size": ("n_embd", 2560),
        "intermediate_size": ("d_ff", 18432),
        "max_position_embeddings": ("context_length", 4096),
        "rms_norm_eps": ("norm_eps", 1e-5),
    },
}

_LONGEST_CONTEXT = 1 << 24  # rotary tables are made for all of it, 8 GB for heads of 128
_MOST_LABELS = 10_000

# Fields that change what is computed, and the values that our axes can express.
_NOTHING: tuple[Any, ...] = (None, {}, [], False)
_EXPRESSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": _NOTHING,
    "per_layer_config": _NOTHING,
    "pruned_heads": _NOTHING,
    "is_encoder_decoder": _NOTHING,
    "add_cross_attention": _NOTHING,
    "is_causal": (True, None),
    "partial_rotary_factor": (1, None),
}
_GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}
_OF_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": tuple(_GELU),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish")},
    "qwen2": {"hidden_act": ("silu", "swish")},
    "qwen3": {"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
    "arcee": {"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
}


def class_name(raw: Mapping[str, Any], path: Path) -> str:
    """Which stock class a config.json is of. ValueError if it is none that we can compute."""
    family, named = FAMILIES.get(str(raw.get("model_type"))), raw.get("architectures")
    known = f"{path}: %s, and what can be imported are {', '.join(FAMILIES)}"
    if family is None:
        raise ValueError(known % f"model_type {str(raw.get('model_type'))[:40]!r}")
    plain = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    if not named:
        return plain
    if named not in ([plain], [f"{family}ForSequenceClassification"]):
        raise ValueError(
            f"{path}: architectures {str(named)[:60]}: of {family}, {plain} and "
            f"{family}ForSequenceClassification can be imported"
        )
    return str(named[0])


def model_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """The architecture that a config.json describes.

    Raises ValueError naming `path`, the field and its value if that is another one than our axes
    can express, or no number at all.
    """
    kind, cls = str(raw.get("model_type")), class_name(raw, path)
    for field, expressed in (_EXPRESSED | _OF_FAMILY[kind]).items():
        if field in raw and raw[field] not in expressed:
            raise _refusal(path, field, raw[field])
    sizes = {ours: raw.get(there, default) for there, (ours, default) in _SIZES[kind].items()}
    fields: dict[str, Any] = {"tie_embeddings": raw.get("tie_word_embeddings", kind == "gpt2")}
    if kind == "gpt2":
        fields |= dict(norm="layernorm", position="learned", bias="all")
        fields["mlp"] = _GELU[raw.get("activation_function", "gelu_new")]
        fields["d_ff"] = raw.get("n_inner")
    else:
        _refuse_windows(raw, path)
        fields |= dict(mlp="relu2" if kind == "arcee" else "swiglu", qk_norm=kind == "qwen3")
        biased = kind == "llama" and (raw.get("attention_bias") or raw.get("mlp_bias"))
        fields["bias"] = "qkv" if kind == "qwen2" else "all" if biased else "none"
        fields["rope_theta"], fields["rope_scaling"] = _rope(raw, path)
    dropouts = _dropouts(raw, path)
    highest = max(dropouts, key=lambda name: dropouts[name])
    fields["dropout"] = dropouts[highest]
    if cls.endswith("ForSequenceClassification"):
        fields["labels"] = _labels(raw, path)
    try:
        config = ModelConfig(**sizes, **fields)
    except ValidationError as error:
        names = {ours: there for there, (ours, _) in _SIZES[kind].items()}
        names |= {"tie_embeddings": "tie_word_embeddings", "dropout": highest}
        raise config_error(path, error, names) from None
    if config.context_length > _LONGEST_CONTEXT:
        raise _refusal(path, "a context of", config.context_length)
    return config


def notes(raw: Mapping[str, Any], path: Path) -> list[str]:
    """What config.json says that the user should hear, of a model that can be imported."""
    found = []
    if raw.get("auto_map"):
        found.append("code that the model brings along (auto_map) is left alone: it is not needed")
    dropouts = _dropouts(raw, path)
    highest = max(dropouts.values())
    if highest and (len(dropouts) == 1 or min(dropouts.values()) < highest):
        written = ", ".join(f"{name} {value}" for name, value in dropouts.items())
        found.append(f"training uses dropout {highest} wherever it has one: it came with {written}")
    return found


_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")  # GPT-2's; others have attention_dropout


def _dropouts(raw: Mapping[str, Any], path: Path) -> dict[str, float]:
    gpt2 = raw.get("model_type") == "gpt2"
    dropouts = {
        name: raw.get(name, 0.1 if gpt2 else 0.0)
        for name in (_DROPOUTS if gpt2 else ("attention_dropout",))
    }
    for name, value in dropouts.items():
        if not isinstance(value, int | float):
            raise _refusal(path, name, value)
    return dropouts


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[Any, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling`."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _refusal(path, field, rope)
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    whole = rope.get("partial_rotary_factor") in (1, None)
    if kind not in ("default", "linear", "llama3") or not whole:
        raise _refusal(path, field, rope)
    if kind == "default":
        return theta, None
    given = {name: rope[name] for name in RopeScaling.model_fields if name in rope}
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    try:
        return theta, RopeScaling(**{**given, "rope_type": kind})
    except ValidationError as error:
        names = {name: f"{field}.{name}" for name in RopeScaling.model_fields}
        raise config_error(path, error, names) from None


def _refuse_windows(raw: Mapping[str, Any], path: Path) -> None:
    """ValueError for a Qwen whose sliding windows are in use (in other classes there are none)."""
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _refusal(path, "layer_types", kinds)
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    layers = raw.get("num_hidden_layers", 32)
    none = isinstance(first, int) and isinstance(layers, int) and first >= layers
    if raw.get("use_sliding_window") and window is not None and not kinds and not none:
        raise _refusal(path, "sliding_window", window)


def _labels(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    problem = raw.get("problem_type")
    if problem not in (None, "single_label_classification"):
        raise _refusal(path, "problem_type", problem)
    names = raw.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # the default: two classes
    labels = {str(i): name for i, name in names.items()} if isinstance(names, dict) else {}
    if not labels or labels.keys() != {str(i) for i in range(len(labels))}:
        raise ValueError(f'{path}: id2label {str(names)[:60]} is no {{"0": name, "1": ...}}')
    if len(labels) > _MOST_LABELS:
        raise ValueError(
            f"{path}: id2label has {len(labels):,} classes, more than {_MOST_LABELS:,}"
        )
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def _refusal(path: Path, field: str, value: Any) -> ValueError:
    return ValueError(f"{path} has {field} {str(value)[:100]}, which gptsmith's models cannot do")


def config_json(
    c: ModelConfig, dtype: torch.dtype, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of the stock class of `c`, in the spellings of transformers 4 and 5.

    tokens: bos_token_id, eos_token_id, pad_token_id. Raises ValueError as stock_class does.
    """
    cls = stock_class(c)
    kind = next(kind for kind, family in FAMILIES.items() if cls.startswith(family))
    name = str(dtype).removeprefix("torch.")
    raw: dict[str, Any] = {"architectures": [cls], "model_type": kind}
    raw |= {there: getattr(c, ours) for there, (ours, _) in _SIZES[kind].items()}
    if kind == "gpt2":
        gelu = next(there for there, ours in _GELU.items() if ours == c.mlp)
        raw |= {"n_ctx": c.context_length, "n_inner": c.F, "activation_function": gelu}
        raw |= dict.fromkeys(_DROPOUTS, c.dropout)
    else:
        rope = {"rope_type": "default"} if c.rope_scaling is None else _scaling(c.rope_scaling)
        raw |= {
            "hidden_act": "relu2" if kind == "arcee" else "silu",
            "attention_dropout": c.dropout,
            "rope_theta": c.rope_theta,
            "rope_scaling": None if c.rope_scaling is None else rope,
            "rope_parameters": {"rope_theta": c.rope_theta, **rope},
        }
        if kind in ("llama", "arcee"):
            raw |= dict.fromkeys(("attention_bias", "mlp_bias"), c.bias == "all")
        elif kind == "qwen3":
            raw["attention_bias"] = False
        if kind.startswith("qwen"):
            raw["use_sliding_window"] = False
    if c.labels:
        raw["id2label"] = {str(i): label for i, label in enumerate(c.labels)}
        raw["label2id"] = {label: i for i, label in enumerate(c.labels)}
        raw["problem_type"] = "single_label_classification"
    return raw | {
        "tie_word_embeddings": c.tie_embeddings,
        **tokens,
        "dtype": name,
        "torch_dtype": name,
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return scaling.model_dump()


def tensor_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of the stock class of `c`, by its names."""
    shapes = {}
    for ours, shape in state_dict.shapes(c).items():
        there = place(c, ours, shape[0])
        for name, rows in zip(there.names, there.rows, strict=True):
            whole = (rows, *shape[1:])
            shapes[name] = whole[::-1] if there.transposed else whole
    return shapes

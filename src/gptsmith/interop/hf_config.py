"""Convert a transformers config.json to a ModelConfig and back, by the records of hf_mapping.py.

A field that config.json omits has the default of its class, except for sizes, which are required.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
from pydantic import ValidationError

from gptsmith.interop.external_model import config_error
from gptsmith.interop.hf_mapping import FAMILIES, Family, family_of
from gptsmith.model.config import ModelConfig, RopeScaling

_UNSET: tuple[Any, ...] = (None, {}, [], False)
# Fields of every family that change the computation, with the values that are supported.
_SUPPORTED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": _UNSET,
    "per_layer_config": _UNSET,
    "pruned_heads": _UNSET,
    "is_encoder_decoder": _UNSET,
    "add_cross_attention": _UNSET,
    "is_causal": (True, None),
    "partial_rotary_factor": (1, None),
}
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")  # GPT-2's; others have attention_dropout


# --- config.json -> ModelConfig ------------------------------------------------------------------


def read(raw: Mapping[str, Any], path: Path) -> tuple[ModelConfig, str, list[str]]:
    """The architecture that a config.json describes, its class, and notes for the user.

    Raises ValueError naming `path`, the field and its value if ModelConfig cannot express it.
    """
    family, cls = _family(raw, path)
    for name, expressed in (*_SUPPORTED_VALUES.items(), *family.fixed.items()):
        if name in raw and raw[name] not in expressed:
            raise _unsupported(path, name, raw[name])
    fields: dict[str, Any] = {axis: values[0] for axis, values in family.axes.items()}
    fields |= {ours: raw.get(theirs) for theirs, ours in family.sizes.items()}
    fields["tie_embeddings"] = raw.get("tie_word_embeddings", family.gpt2)
    name, activations = family.activation
    activation = raw.get(name, next(iter(activations)))
    if not isinstance(activation, str) or activation not in activations:
        raise _unsupported(path, name, activation)
    fields["mlp"] = activations[activation]
    if family.gpt2:
        fields["d_ff"] = raw.get("n_inner")
    else:
        _check_no_sliding_window(raw, path)
        fields["rope_theta"], fields["rope_scaling"] = _rope(raw, path)
    if "all" in family.axes["bias"] and (raw.get("attention_bias") or raw.get("mlp_bias")):
        fields["bias"] = "all"
    names, default = (_DROPOUTS, 0.1) if family.gpt2 else (("attention_dropout",), 0.0)
    dropouts = {name: raw.get(name, default) for name in names}
    for name, value in dropouts.items():
        if not isinstance(value, int | float):
            raise _unsupported(path, name, value)
    highest = max(dropouts, key=lambda name: dropouts[name])
    fields["dropout"] = dropouts[highest]
    if cls == family.class_name(classifier=True):
        fields["labels"] = _labels(raw, path)
    try:
        config = ModelConfig(**fields)
    except ValidationError as error:
        theirs = {ours: theirs for theirs, ours in family.sizes.items()}
        theirs |= {"tie_embeddings": "tie_word_embeddings", "dropout": highest}
        raise config_error(path, error, theirs) from None
    notes = []
    if raw.get("auto_map"):
        notes.append("the model's own code (auto_map) is ignored: it is not needed")
    if config.dropout and (not family.gpt2 or min(dropouts.values()) < config.dropout):
        written = ", ".join(f"{name} {value}" for name, value in dropouts.items())
        notes.append(
            f"training applies dropout {config.dropout} everywhere: config.json has {written}"
        )
    return config, cls, notes


def _family(raw: Mapping[str, Any], path: Path) -> tuple[Family, str]:
    """The family and the class of a config.json. ValueError for unsupported ones."""
    kind, named = str(raw.get("model_type")), raw.get("architectures")
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:
        raise ValueError(
            f"{path}: model_type {kind[:40]!r} cannot be imported: expected one of "
            f"{', '.join(family.model_type for family in FAMILIES)}"
        )
    classes = [family.class_name(), family.class_name(classifier=True)]
    if named and named not in ([name] for name in classes):
        raise ValueError(
            f"{path}: architectures {str(named)[:60]} cannot be imported: expected "
            f"{' or '.join(classes)}"
        )
    return family, str((named or classes)[0])


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[Any, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling`."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _unsupported(path, name, rope)
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    whole = rope.get("partial_rotary_factor") in (1, None)
    if kind not in ("default", "linear", "llama3") or not whole:
        raise _unsupported(path, name, rope)
    if kind == "default":
        return theta, None
    given = {key: rope[key] for key in RopeScaling.model_fields if key in rope}
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    try:
        return theta, RopeScaling(**{**given, "rope_type": kind})
    except ValidationError as error:
        names = {key: f"{name}.{key}" for key in RopeScaling.model_fields}
        raise config_error(path, error, names) from None


def _check_no_sliding_window(raw: Mapping[str, Any], path: Path) -> None:
    """ValueError for a Qwen that uses sliding-window attention (other classes have none)."""
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _unsupported(path, "layer_types", kinds)
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    layers = raw.get("num_hidden_layers", 32)
    none = isinstance(first, int) and isinstance(layers, int) and first >= layers
    if raw.get("use_sliding_window") and window is not None and not kinds and not none:
        raise _unsupported(path, "sliding_window", window)


def _labels(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    problem = raw.get("problem_type")
    if problem not in (None, "single_label_classification"):
        raise _unsupported(path, "problem_type", problem)
    names = raw.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # the default: two classes
    labels = {str(i): name for i, name in names.items()} if isinstance(names, dict) else {}
    if not labels or labels.keys() != {str(i) for i in range(len(labels))}:
        raise ValueError(f'{path}: id2label {str(names)[:60]}: expected {{"0": name, "1": ...}}')
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def _unsupported(path: Path, name: str, value: Any) -> ValueError:
    return ValueError(f"{path} has {name} {str(value)[:100]}, which gptsmith does not support")


# --- ModelConfig -> config.json ------------------------------------------------------------------


def config_json(c: ModelConfig, dtype: torch.dtype, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the transformers class of `c`, readable by transformers 4 and 5.

    tokens: bos_token_id, eos_token_id, pad_token_id. Raises ValueError as family_of does.
    """
    family = family_of(c)
    name, activations = family.activation
    raw: dict[str, Any] = {
        "architectures": [family.class_name(bool(c.labels))],
        "model_type": family.model_type,
        **{theirs: getattr(c, ours) for theirs, ours in family.sizes.items()},
        **{theirs: values[0] for theirs, values in family.fixed.items()},
        name: next(theirs for theirs, ours in activations.items() if ours == c.mlp),
    }
    if family.gpt2:
        raw |= {"n_ctx": c.context_length, "n_inner": c.F, **dict.fromkeys(_DROPOUTS, c.dropout)}
    else:
        raw |= {"attention_dropout": c.dropout, **_rope_json(c)}
        if family.model_type.startswith("qwen"):
            raw["use_sliding_window"] = False
        if "all" in family.axes["bias"]:
            raw |= dict.fromkeys(("attention_bias", "mlp_bias"), c.bias == "all")
    if c.labels:
        raw["id2label"] = {str(i): label for i, label in enumerate(c.labels)}
        raw["label2id"] = {label: i for i, label in enumerate(c.labels)}
        raw["problem_type"] = "single_label_classification"
    numbers = str(dtype).removeprefix("torch.")
    ties = {"tie_word_embeddings": c.tie_embeddings}
    return {**raw, **ties, **tokens, "dtype": numbers, "torch_dtype": numbers}


def _rope_json(c: ModelConfig) -> dict[str, Any]:
    """The rotation in the spellings of transformers 4 (rope_scaling) and 5 (rope_parameters)."""
    scaling: dict[str, Any] | None = None
    if c.rope_scaling is not None:
        match c.rope_scaling.rope_type:
            case "linear":
                scaling = {"rope_type": "linear", "factor": c.rope_scaling.factor}
            case "llama3":
                scaling = c.rope_scaling.model_dump()
            case _:
                assert_never(c.rope_scaling.rope_type)
    rope = {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": c.rope_theta, "rope_scaling": scaling, "rope_parameters": rope}

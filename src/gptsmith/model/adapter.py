"""Our adapters in the form of peft, and peft's in ours: names and shapes, no files.

peft knows the modules of the stock classes of transformers, where q, k and v (gate and up) are
layers of their own; ours are fused. An adapter of ours is split by the rows of B, each part with
the same A. Adapters of several parts are joined: parts with the same A share it, others are laid
block by block, A below A and B beside B, at a multiple of the rank and of alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import LoraConfig, attach
from gptsmith.model.stock import GPT2_NAMES, LLAMA_NAMES, OWN_NAMES, Names, stock_class
from gptsmith.model.tuning import load_trainable_state_dict, trainable_state_dict

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"

# Fields of adapter_config.json that make an adapter another function than A and B say.
_FOREIGN = (
    "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
    "use_qalora", "use_bdlora", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip


@dataclass(frozen=True)
class _Linear:
    """A linear layer of our blocks: its parts elsewhere, their rows (of B), its columns (of A)."""

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


def _linears(c: ModelConfig, names: Names) -> dict[str, _Linear]:
    heads, kv = c.n_head * c.D, c.K * c.D
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "attention.qkv": ((heads, kv, kv), c.n_embd),
        "attention.proj": ((c.n_embd,), heads),
        "mlp.gate_up": ((c.F, c.F), c.n_embd),
        "mlp.up": ((c.F,), c.n_embd),
        "mlp.down": ((c.n_embd,), c.F),
    }
    del shapes["mlp.up" if c.mlp == "swiglu" else "mlp.gate_up"]
    linears = {}
    for kind, (rows, columns) in shapes.items():
        parts = names.linears[kind]
        linears[kind] = _Linear(parts, rows if len(parts) > 1 else (sum(rows),), columns)
    return linears


def to_peft(
    config: ModelConfig,
    lora: LoraConfig,
    tensors: Mapping[str, Tensor],
    token_ids: Sequence[int] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """adapter_model.safetensors and adapter_config.json of the trained tensors of a model.

    peft opens them over the model's stock class. Where there is none, modules keep our names,
    and `auto_mapping` in the configuration names our class.
    """
    try:
        names = GPT2_NAMES if stock_class(config).startswith("GPT2") else LLAMA_NAMES
    except ValueError:
        names = OWN_NAMES
    linears = _linears(config, names)
    adapted: set[str] = set()
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.lora_([AB])", name):
            layer, kind, side = found.groups()
            adapted.add(kind)
            linear = linears[kind]
            shares = [tensor] * len(linear.parts) if side == "A" else tensor.split(linear.rows)
            for part, share in zip(linear.parts, shares, strict=True):
                key = f"{_PREFIX}{names.blocks}.{layer}.{part}.lora_{side}.weight"
                theirs[key] = share.clone()  # safetensors wants no two that share memory
        elif name.endswith(".rows"):
            table = names.head if name == "head.rows" else names.embedding
            theirs[f"{_PREFIX}{table}{_ROWS}"] = tensor
        else:
            assert name == "score.weight", name
            theirs[_PREFIX + name] = tensor
    tables = [names.embedding] + [names.head] * ("head.rows" in tensors)
    return theirs, dict(
        peft_type="LORA",
        task_type=None if names is OWN_NAMES else "SEQ_CLS" if config.labels else "CAUSAL_LM",
        auto_mapping=_own_class(config) if names is OWN_NAMES else None,
        base_model_name_or_path=None,
        inference_mode=True,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(linears, adapted),
        fan_in_fan_out=names is GPT2_NAMES,  # stock GPT-2 has its weights transposed
        bias="none",
        modules_to_save=["score"] if config.labels else None,
        trainable_token_indices={t.split(".")[-1]: list(token_ids) for t in tables}
        if token_ids
        else None,
    )


def _own_class(c: ModelConfig) -> dict[str, str]:
    if c.labels:
        return dict(base_model_class="GPTClassifier", parent_library="gptsmith.model.classifier")
    return dict(base_model_class="GPTModel", parent_library="gptsmith.model.gpt")


def _targets(linears: Mapping[str, _Linear], adapted: set[str]) -> list[str]:
    """Module names as peft matches them, by their end: the last word where that is enough."""
    wanted = [part for kind, linear in linears.items() if kind in adapted for part in linear.parts]
    others = {part for linear in linears.values() for part in linear.parts} - set(wanted)
    taken = {part.split(".")[-1] for part in others}
    last = {part: part.split(".")[-1] for part in wanted}
    return list(dict.fromkeys(part if word in taken else word for part, word in last.items()))


def from_peft(
    config: ModelConfig, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any]
) -> tuple[LoraConfig, dict[str, Tensor], list[int]]:
    """The inverse of `to_peft`: LoRA's configuration, tensors by our names, ids of trained rows.

    All matrices get one rank, the largest that joining needs; what the adapter leaves alone or
    has at a smaller rank is filled with zeros, and computes the same. Raises ValueError naming a
    field of adapter_config.json or a tensor that means something else than LoRA on the linear
    layers of the blocks.
    """
    _refuse_other_kinds(config, adapter)
    names = OWN_NAMES
    if not str((adapter.get("auto_mapping") or {}).get("parent_library")).startswith("gptsmith."):
        names = GPT2_NAMES if stock_class(config).startswith("GPT2") else LLAMA_NAMES
    linears, rank = _linears(config, names), int(adapter["r"])
    matrices: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"adapter tensor {key} holds NaN or infinity: its training diverged")
        name = key.removeprefix(_PREFIX)
        if name in (names.embedding + _ROWS, names.head + _ROWS):
            ours["head.rows" if name.startswith(names.head) else "embedding.token.rows"] = tensor
        elif name == "score.weight" and config.labels:
            ours[name] = tensor
        else:
            matrices[name.removeprefix(f"{names.blocks}.").removesuffix(".weight")] = tensor
    joined: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for kind, linear in linears.items():
        for layer in range(config.n_layer):
            joined[kind, layer] = _join(linear, rank, str(layer), matrices)
    if matrices:
        raise ValueError(
            f"adapter tensor {next(iter(matrices))} has no place in a model of {config.n_layer} "
            "layers: only LoRA on the linear layers of its blocks, rows of new tokens and a "
            "classifier's head are read"
        )
    kinds = [
        kind for kind in linears if any(len(joined[kind, i][0]) for i in range(config.n_layer))
    ]
    highest = max(len(a) for a, _ in joined.values())
    if not highest:
        raise ValueError("the adapter holds no LoRA matrices: it would change nothing")
    for (kind, layer), (a, b) in joined.items():
        if kind in kinds:
            zeros = highest - len(a)
            ours[f"blocks.{layer}.{kind}.lora_A"] = torch.cat([a, a.new_zeros(zeros, a.shape[1])])
            ours[f"blocks.{layer}.{kind}.lora_B"] = torch.cat([b, b.new_zeros(len(b), zeros)], 1)
    lora = LoraConfig(
        rank=highest,
        alpha=float(adapter["lora_alpha"]) * highest / rank,
        dropout=float(adapter.get("lora_dropout", 0.0)),
        targets=() if len(kinds) == len(linears) else tuple(k.split(".")[1] for k in kinds),
    )
    return lora, ours, _token_ids(adapter, ours)


def _join(
    linear: _Linear, r: int, layer: str, matrices: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A (k * r, columns) and B (all rows, k * r) of a fused matrix, from the adapters of some of
    its parts (r), which have k different A. Takes what it uses out of `matrices`."""
    different: list[Tensor] = []
    blocks: list[tuple[int, int, Tensor]] = []  # top row, place among the different A, B
    for i, part in enumerate(linear.parts):
        pair = [matrices.pop(f"{layer}.{part}.lora_{side}", None) for side in "AB"]
        shapes = [None if x is None else tuple(x.shape) for x in pair]
        if shapes == [None, None]:
            continue
        if shapes != [(r, linear.columns), (linear.rows[i], r)]:
            raise ValueError(
                f"adapter of layer {layer}, {part}: A is {shapes[0]} and B {shapes[1]}, but the "
                f"rank is {r} and the layer {linear.columns} to {linear.rows[i]}: it is for "
                "another model, or incomplete"
            )
        a, b = (x for x in pair if x is not None)
        at = next((i for i, x in enumerate(different) if torch.equal(a, x)), len(different))
        different[at:] = different[at:] or [a]
        blocks.append((sum(linear.rows[:i]), at * r, b))
    joined_a = torch.cat([*different, torch.empty(0, linear.columns)])
    joined_b = torch.zeros(sum(linear.rows), len(joined_a), dtype=joined_a.dtype)
    for top, left, b in blocks:
        joined_b[top : top + len(b), left : left + r] = b
    return joined_a, joined_b


def attach_peft(
    model: GPTModel, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any], origin: str | Path
) -> tuple[LoraConfig, list[int]]:
    """Attach an adapter in peft's form to `model` in place: what `attach` would be called with.

    `merge` then folds it in. Raises ValueError as from_peft does, and naming `origin` for missing
    tensors.
    """
    lora, ours, token_ids = from_peft(model.config, tensors, adapter)
    attach(model, lora, token_ids)
    # An adapter may train new rows in one of two tables only: the other stays as it is.
    rows = {
        name: tensor
        for name, tensor in trainable_state_dict(model).items()
        if name.endswith(".rows")
    }
    load_trainable_state_dict(model, {**rows, **ours}, origin)
    return lora, token_ids


def _refuse_other_kinds(config: ModelConfig, adapter: Mapping[str, Any]) -> None:
    bad = [field for field in _FOREIGN if adapter.get(field)]
    if adapter.get("peft_type") != "LORA":
        bad.append("peft_type")
    if adapter.get("bias", "none") != "none":
        bad.append("bias")
    if adapter.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        bad.append("init_lora_weights")  # others change the base model's weights as well
    bad += [f for f in ("r", "lora_alpha") if not isinstance(adapter.get(f), int | float)]
    heads = {"score", "classifier"} if config.labels else set()
    if set(adapter.get("modules_to_save") or ()) - heads:
        bad.append("modules_to_save")
    if bad:
        raise ValueError(
            f"adapter_config.json has {bad[0]} {adapter.get(bad[0])!r}: only plain LoRA is read; "
            "merge the adapter with peft (merge_and_unload) and import the model"
        )


def _token_ids(adapter: Mapping[str, Any], ours: Mapping[str, Tensor]) -> list[int]:
    """The ids whose rows the adapter holds; one list, though peft allows one for each table."""
    given = adapter.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    sizes = {len(tensor) for name, tensor in ours.items() if name.endswith(".rows")}
    if any(ids != lists[0] for ids in lists) or sizes - {len(lists[0])}:
        raise ValueError(
            f"adapter_config.json has trainable_token_indices {str(given)[:100]}: one list of ids "
            "is read, the same for embedding and head, with as many rows in the adapter"
        )
    return list(lists[0])

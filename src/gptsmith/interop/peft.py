"""LoRA adapters on disk, in peft's form: written, read, and converted to our names and back.

peft knows the modules of transformers' classes, where q, k and v (gate and up) are separate layers;
ours are fused. An adapter of ours is split by the rows of B, every part with the same A. Adapters
of several parts are joined: parts with the same A share it; others are stacked, A below A and B
next to B, with rank and alpha multiplied accordingly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from torch import Tensor

from gptsmith import files
from gptsmith.interop.hf_mapping import GPT2_NAMES, LLAMA_NAMES, Names, family_of, stored
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import LoraConfig, attach
from gptsmith.model.tuning import load_trainable_state_dict, trainable_state_dict
from gptsmith.train import checkpoint as checkpoints

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"

# For an architecture that no class of transformers has: our modules keep their names.
_OWN_NAMES: Names = {name: (name,) for name in (*GPT2_NAMES, *LLAMA_NAMES)}

# Fields of adapter_config.json that make an adapter compute something else than A and B say.
_UNSUPPORTED = (
    "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
    "use_qalora", "use_bdlora", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip


class _Fields(BaseModel):
    """Types of the fields of adapter_config.json that are read here."""

    model_config = ConfigDict(strict=True)

    r: PositiveInt
    lora_alpha: FiniteFloat
    lora_dropout: float = Field(0.0, ge=0, le=1)
    auto_mapping: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter for a model of ours."""

    lora: LoraConfig
    tensors: Mapping[str, Tensor]
    """By our names: `blocks.0.attention.qkv.lora_A`, `.lora_B`, `embedding.token.rows`,
    `head.rows`, `score.weight`."""
    token_ids: Sequence[int] = ()
    """Ids of the trained rows of embedding and head."""


def save(
    folder: Path,
    config: ModelConfig,
    adapter: Adapter,
    metadata: Mapping[str, str] | None = None,
    base_model: str | None = None,
    atomic: Callable[[Path], AbstractContextManager[Path]] = files.atomic_path,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, durably, into an existing folder.

    metadata: for the header of the tensors. base_model: the model that peft adds the adapter to.
    atomic: how a file is replaced.
    """
    tensors, fields = to_peft(config, adapter)
    with atomic(folder / CONFIG) as temporary:
        temporary.write_bytes(files.json_bytes({**fields, "base_model_name_or_path": base_model}))
    with atomic(folder / WEIGHTS) as temporary:
        checkpoints.save_tensors(temporary, tensors, metadata)


def load(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder, for a model of `config`. ValueError naming the file that is damaged,
    or as from from_peft."""
    tensors = checkpoints.load_tensors(folder / WEIGHTS)
    path = folder / CONFIG
    return from_peft(config, tensors, files.mapping(files.read_json(path), path))


@dataclass(frozen=True)
class _Linear:
    """A linear layer of our blocks: its parts elsewhere, their rows (of B), its columns (of A)."""

    parts: tuple[str, ...]  # with * for the number of the block
    rows: tuple[int, ...]
    columns: int


def _names(config: ModelConfig) -> Names:
    try:
        return family_of(config).names
    except ValueError:
        return _OWN_NAMES


def _linears(config: ModelConfig, names: Names) -> dict[str, _Linear]:
    """By our name within a block (`attention.qkv`)."""
    linears = {}
    for name, shape in state_dict.shapes(config).items():
        if len(shape) == 2 and (found := re.fullmatch(r"blocks\.0\.(.+)\.weight", name)):
            layout = stored(config, names, name, shape[0])
            linears[found[1]] = _Linear(names[f"blocks.*.{found[1]}"], layout.rows, shape[1])
    return linears


def to_peft(config: ModelConfig, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of adapter_model.safetensors and adapter_config.json.

    peft opens them over the model's transformers class. Where there is none, modules keep our
    names, and `auto_mapping` in the configuration names our class.
    """
    names = _names(config)
    own, linears = names is _OWN_NAMES, _linears(config, names)
    adapted: set[str] = set()
    theirs: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.lora_([AB])", name):
            layer, kind, side = found.groups()
            adapted.add(kind)
            linear = linears[kind]
            shares = [tensor] * len(linear.parts) if side == "A" else tensor.split(linear.rows)
            for part, share in zip(linear.parts, shares, strict=True):
                key = f"{_PREFIX}{part.replace('*', layer)}.lora_{side}.weight"
                theirs[key] = share.clone()  # safetensors refuses tensors that share memory
        elif name.endswith(".rows"):
            theirs[f"{_PREFIX}{names[name.removesuffix('.rows')][0]}{_ROWS}"] = tensor
        else:
            assert name == "score.weight", name
            theirs[_PREFIX + name] = tensor
    tables = ["embedding.token"] + ["head"] * ("head.rows" in adapter.tensors)
    ids = {names[table][0].split(".")[-1]: list(adapter.token_ids) for table in tables}
    return theirs, dict(
        peft_type="LORA",
        task_type=None if own else "SEQ_CLS" if config.labels else "CAUSAL_LM",
        auto_mapping=_own_class(config) if own else None,
        base_model_name_or_path=None,
        inference_mode=True,
        r=adapter.lora.rank,
        lora_alpha=adapter.lora.alpha,
        lora_dropout=adapter.lora.dropout,
        target_modules=_targets(linears, adapted),
        fan_in_fan_out=names is GPT2_NAMES,  # GPT-2 stores its matrices transposed
        bias="none",
        modules_to_save=["score"] if config.labels else None,
        trainable_token_indices=ids if adapter.token_ids else None,
    )


def _own_class(c: ModelConfig) -> dict[str, str]:
    if c.labels:
        return dict(base_model_class="GPTClassifier", parent_library="gptsmith.model.classifier")
    return dict(base_model_class="GPTModel", parent_library="gptsmith.model.gpt")


def _targets(linears: Mapping[str, _Linear], adapted: set[str]) -> list[str]:
    """Module names as peft matches them, by their end: the last word where that is unambiguous,
    else what follows the number of the block."""
    parts = {kind: [p.partition("*.")[2] for p in linear.parts] for kind, linear in linears.items()}
    wanted = [part for kind in parts if kind in adapted for part in parts[kind]]
    others = {part for kind in parts for part in parts[kind]} - set(wanted)
    taken = {part.split(".")[-1] for part in others}
    last = {part: part.split(".")[-1] for part in wanted}
    return list(dict.fromkeys(part if word in taken else word for part, word in last.items()))


def from_peft(
    config: ModelConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> Adapter:
    """The inverse of `to_peft`; fields: adapter_config.json.

    All matrices get one rank, the largest that joining needs; a module without an adapter, or with
    one of smaller rank, is filled with zeros and computes the same. Raises ValueError naming a
    field of adapter_config.json or a tensor that is not LoRA on the linear layers of the blocks.
    """
    _refuse_other_kinds(config, fields)
    parent = str((fields.get("auto_mapping") or {}).get("parent_library"))
    names = _OWN_NAMES if parent.startswith("gptsmith.") else family_of(config).names
    linears, rank = _linears(config, names), int(fields["r"])
    tables = {names[table][0] + _ROWS: f"{table}.rows" for table in ("embedding.token", "head")}
    matrices: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"adapter tensor {key} contains NaN or infinity: its training diverged"
            )
        name = key.removeprefix(_PREFIX)
        if name in tables:
            ours[tables[name]] = tensor
        elif name == "score.weight" and config.labels:
            ours[name] = tensor
        else:
            matrices[name.removesuffix(".weight")] = tensor
    joined: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for kind, linear in linears.items():
        for layer in range(config.n_layer):
            joined[kind, layer] = _join(linear, rank, str(layer), matrices)
    if matrices:
        raise ValueError(
            f"adapter tensor {next(iter(matrices))} does not belong to a model of {config.n_layer} "
            "layers: expected LoRA on the linear layers of its blocks, rows of new tokens and a "
            "classifier's head"
        )
    kinds = [
        kind for kind in linears if any(len(joined[kind, i][0]) for i in range(config.n_layer))
    ]
    highest = max(len(a) for a, _ in joined.values())
    if not highest:
        raise ValueError("the adapter has no LoRA matrices: it would change nothing")
    for (kind, layer), (a, b) in joined.items():
        if kind in kinds:
            zeros = highest - len(a)
            ours[f"blocks.{layer}.{kind}.lora_A"] = torch.cat([a, a.new_zeros(zeros, a.shape[1])])
            ours[f"blocks.{layer}.{kind}.lora_B"] = torch.cat([b, b.new_zeros(len(b), zeros)], 1)
    lora = LoraConfig(
        rank=highest,
        alpha=float(fields["lora_alpha"]) * highest / rank,
        dropout=float(fields.get("lora_dropout", 0.0)),
        targets=() if len(kinds) == len(linears) else tuple(k.split(".")[1] for k in kinds),
    )
    return Adapter(lora, ours, _token_ids(fields, ours))


def _join(
    linear: _Linear, r: int, layer: str, matrices: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A (k * r, columns) and B (all rows, k * r) of a fused matrix, from the adapters (rank r) of
    some of its parts, which have k different A. Removes what it uses from `matrices`."""
    different: list[Tensor] = []
    blocks: list[tuple[int, int, Tensor]] = []  # top row, index among the different A, B
    for i, part in enumerate(linear.parts):
        name = part.replace("*", layer)
        pair = [matrices.pop(f"{name}.lora_{side}", None) for side in "AB"]
        shapes = [None if x is None else tuple(x.shape) for x in pair]
        if shapes == [None, None]:
            continue
        if shapes != [(r, linear.columns), (linear.rows[i], r)]:
            raise ValueError(
                f"adapter of {name}: A is {shapes[0]} and B {shapes[1]}, but the rank is {r} and "
                f"the layer {linear.columns} to {linear.rows[i]}: it is for another model, or "
                "incomplete"
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


def attach_adapter(model: GPTModel, adapter: Adapter, origin: str | Path) -> None:
    """Attach an adapter to `model` in place; `lora.merge` then folds it in.

    Raises ValueError naming `origin` for tensors that are missing or do not fit.
    """
    attach(model, adapter.lora, adapter.token_ids)
    # peft may train new rows in one of the two tables only: the other stays as it is.
    rows = {n: t for n, t in trainable_state_dict(model).items() if n.endswith(".rows")}
    load_trainable_state_dict(model, {**rows, **adapter.tensors}, origin)


def _refuse_other_kinds(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    bad = [field for field in _UNSUPPORTED if fields.get(field)]
    if fields.get("peft_type") != "LORA":
        bad.append("peft_type")
    if fields.get("bias", "none") != "none":
        bad.append("bias")
    if fields.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        bad.append("init_lora_weights")  # others change the base model's weights as well
    try:
        read = _Fields.model_validate(fields)
    except ValidationError as error:
        bad.append(str(error.errors()[0]["loc"][0]))
    else:
        heads = {"score", "classifier"} if config.labels else set()
        if set(read.modules_to_save or ()) - heads:
            bad.append("modules_to_save")
    if bad:
        raise ValueError(
            f"{CONFIG} has {bad[0]} {fields.get(bad[0])!r:.100}: only plain LoRA is supported; "
            "merge the adapter with peft (merge_and_unload) and import the model"
        )


def _token_ids(fields: Mapping[str, Any], ours: Mapping[str, Tensor]) -> list[int]:
    """The ids whose rows the adapter holds; one list, though peft allows one for each table."""
    given = fields.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    sizes = {len(tensor) for name, tensor in ours.items() if name.endswith(".rows")}
    if any(ids != lists[0] for ids in lists) or sizes - {len(lists[0])}:
        raise ValueError(
            f"{CONFIG} has trainable_token_indices {str(given)[:100]}: expected one list of ids, "
            "the same for embedding and head, with as many rows in the adapter"
        )
    return list(lists[0])

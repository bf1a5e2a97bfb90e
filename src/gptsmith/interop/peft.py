"""LoRA adapters on disk, in peft's format: write, read, and convert to our names and back.

peft uses the modules of transformers' classes, where q, k and v (gate and up) are separate layers;
ours are fused. Our adapters are split by the rows of B, and every part gets a copy of A. Separate
adapters are joined: parts with the same A share it; distinct A's are stacked vertically and their
B's block-diagonally, with rank and alpha multiplied accordingly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from gptsmith.interop.hf_mapping import (
    GPT2_NAMES,
    LLAMA_NAMES,
    Names,
    TensorLayout,
    family_of,
    tensor_layout,
)
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import LoraConfig, attach
from gptsmith.model.tuning import load_trainable_state_dict, trainable_state_dict
from gptsmith.train import checkpoint as checkpoints

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

# For architectures without a transformers class, whose modules keep our names.
_OWN_NAMES: Names = {name: (name,) for name in (*GPT2_NAMES, *LLAMA_NAMES)}

# Fields of adapter_config.json that change what an adapter computes, beyond A and B.
_UNSUPPORTED = (
    "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
    "use_qalora", "use_bdlora", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip


class _Config(BaseModel):
    """The fields of adapter_config.json that are used here, with the values of plain LoRA."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: FiniteFloat
    lora_dropout: float = Field(0.0, ge=0, le=1)
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal"] = True
    """Others change the base model's weights as well."""
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
    return from_peft(config, tensors, files.read_mapping(folder / CONFIG))


def _names(config: ModelConfig) -> Names:
    try:
        return family_of(config).names
    except ValueError:
        return _OWN_NAMES


def _linears(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The linear layers of the blocks and the shapes of their weights."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in state_dict.shapes(config).items()
        if name.startswith("blocks.") and len(shape) == 2
    }


def _layer_kind(module: str) -> str:
    """The name of a layer within its block: `attention.qkv`."""
    return module.split(".", 2)[2]


def to_peft(config: ModelConfig, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of adapter_model.safetensors and adapter_config.json.

    peft opens them over the model's transformers class. Where there is none, modules keep our
    names, and `auto_mapping` in the configuration names our class.
    """
    names = _names(config)
    adapted: set[str] = set()
    theirs: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("lora_A", "lora_B"):
            adapted.add(_layer_kind(module))
            layout = tensor_layout(config, names, name, len(tensor))
            is_shared = kind == "lora_A"
            parts = [tensor] * len(layout.names) if is_shared else tensor.split(layout.rows)
            for part_name, part in zip(layout.names, parts, strict=True):
                # safetensors rejects tensors that share memory
                theirs[f"{_PREFIX}{part_name}.weight"] = part.clone()
        elif kind == "rows":
            theirs[f"{_PREFIX}{names[module][0]}{_TOKEN_ROWS}"] = tensor
        else:
            assert name == "score.weight", name
            theirs[_PREFIX + name] = tensor
    tables = ["embedding.token"] + ["head"] * ("head.rows" in adapter.tensors)
    ids = {names[table][0].split(".")[-1]: list(adapter.token_ids) for table in tables}
    task, mapping = "SEQ_CLS" if config.labels else "CAUSAL_LM", None
    if names is _OWN_NAMES:
        file, cls = ("classifier", "GPTClassifier") if config.labels else ("gpt", "GPTModel")
        mapping = dict(base_model_class=cls, parent_library=f"gptsmith.model.{file}")
    return theirs, dict(
        peft_type="LORA",
        task_type=None if mapping else task,
        auto_mapping=mapping,
        base_model_name_or_path=None,
        inference_mode=True,
        r=adapter.lora.rank,
        lora_alpha=adapter.lora.alpha,
        lora_dropout=adapter.lora.dropout,
        target_modules=_targets(config, names, adapted),
        fan_in_fan_out=names is GPT2_NAMES,  # GPT-2 stores its matrices transposed
        bias="none",
        modules_to_save=["score"] if config.labels else None,
        trainable_token_indices=ids if adapter.token_ids else None,
    )


def _targets(config: ModelConfig, names: Names, adapted: set[str]) -> list[str]:
    """Module names as peft matches them, by their end: the last word where that is unambiguous,
    else what follows the number of the block."""
    parts = {
        part.partition("*.")[2]: kind in adapted
        for kind in dict.fromkeys(map(_layer_kind, _linears(config)))
        for part in names[f"blocks.*.{kind}"]
    }
    words = {part: part.split(".")[-1] for part in parts}
    taken = {words[part] for part, wanted in parts.items() if not wanted}
    found = (p if words[p] in taken else words[p] for p, wanted in parts.items() if wanted)
    return list(dict.fromkeys(found))


def from_peft(
    config: ModelConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> Adapter:
    """The inverse of `to_peft`; fields: adapter_config.json.

    All matrices get one rank, the largest that joining needs; a module without an adapter, or with
    one of smaller rank, is filled with zeros and computes the same. Raises ValueError naming a
    field of adapter_config.json or a tensor that is not LoRA on the linear layers of the blocks.
    """
    read = _validated(config, fields)
    parent = str((read.auto_mapping or {}).get("parent_library"))
    names = _OWN_NAMES if parent.startswith("gptsmith.") else family_of(config).names
    tables = {
        names[table][0] + _TOKEN_ROWS: f"{table}.rows" for table in ("embedding.token", "head")
    }
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
    joined = {}
    for module, (rows, columns) in _linears(config).items():
        layout = tensor_layout(config, names, f"{module}.lora", rows)
        joined[module] = _join(layout, columns, read.r, matrices)
    if matrices:
        raise ValueError(
            f"adapter tensor {next(iter(matrices))} does not belong to a model of {config.n_layer} "
            "layers: expected LoRA on the linear layers of its blocks, rows of new tokens and a "
            "classifier's head"
        )
    rank = max(len(a) for a, _ in joined.values())
    if not rank:
        raise ValueError("the adapter has no LoRA matrices: it would change nothing")
    kinds = dict.fromkeys(_layer_kind(module) for module, (a, _) in joined.items() if len(a))
    for module, (a, b) in joined.items():
        if _layer_kind(module) in kinds:
            zeros = rank - len(a)
            ours[f"{module}.lora_A"] = torch.cat([a, a.new_zeros(zeros, a.shape[1])])
            ours[f"{module}.lora_B"] = torch.cat([b, b.new_zeros(len(b), zeros)], 1)
    every = kinds.keys() == set(map(_layer_kind, joined))
    lora = LoraConfig(
        rank=rank,
        alpha=read.lora_alpha * rank / read.r,
        dropout=read.lora_dropout,
        targets=() if every else tuple(kind.split(".")[1] for kind in kinds),
    )
    return Adapter(lora, ours, _token_ids(read.trainable_token_indices or [], ours))


def _join(
    layout: TensorLayout, columns: int, r: int, matrices: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A (k * r, columns) and B (all rows, k * r) of a fused matrix, from the adapters (rank r) of
    some of its parts, which have k distinct A. Removes what it uses from `matrices`."""
    distinct: list[Tensor] = []
    blocks: list[tuple[int, int, Tensor]] = []  # top row, index among the distinct A, B
    for i, (name, rows) in enumerate(zip(layout.names, layout.rows, strict=True)):
        pair = [matrices.pop(f"{name}_{side}", None) for side in "AB"]
        shapes = [None if x is None else tuple(x.shape) for x in pair]
        if shapes == [None, None]:
            continue
        if shapes != [(r, columns), (rows, r)]:
            raise ValueError(
                f"adapter of {name.removesuffix('.lora')}: A is {shapes[0]} and B {shapes[1]}, but "
                f"the rank is {r} and the layer {columns} to {rows}: it is for another model, or "
                "incomplete"
            )
        a, b = (x for x in pair if x is not None)
        at = next((i for i, x in enumerate(distinct) if torch.equal(a, x)), len(distinct))
        distinct[at:] = distinct[at:] or [a]
        blocks.append((sum(layout.rows[:i]), at * r, b))
    joined_a = torch.cat([*distinct, torch.empty(0, columns)])
    joined_b = torch.zeros(sum(layout.rows), len(joined_a), dtype=joined_a.dtype)
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


def _validated(config: ModelConfig, fields: Mapping[str, Any]) -> _Config:
    bad = next((field for field in _UNSUPPORTED if fields.get(field)), None)
    try:
        read = _Config.model_validate(fields)
        heads = {"score", "classifier"} if config.labels else set()
        if set(read.modules_to_save or ()) - heads:
            bad = bad or "modules_to_save"
    except ValidationError as error:
        bad = bad or str(error.errors()[0]["loc"][0])
    if bad:
        raise ValueError(
            f"{CONFIG} has {bad} {fields.get(bad)!r:.100}: only plain LoRA is supported; "
            "merge the adapter with peft (merge_and_unload) and import the model"
        )
    return read


def _token_ids(given: list[int] | dict[str, list[int]], ours: Mapping[str, Tensor]) -> list[int]:
    """The ids whose rows the adapter holds; one list, though peft allows one for each table."""
    lists = list(given.values()) if isinstance(given, dict) else [given]
    sizes = {len(tensor) for name, tensor in ours.items() if name.endswith(".rows")}
    if any(ids != lists[0] for ids in lists) or sizes - {len(lists[0])}:
        raise ValueError(
            f"{CONFIG} has trainable_token_indices {str(given)[:100]}: expected one list of ids, "
            "the same for embedding and head, with as many rows in the adapter"
        )
    return lists[0]

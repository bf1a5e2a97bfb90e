"""Model folders of transformers: import and export. No custom code is needed or run."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith import files
from gptsmith.interop import hf_config, hf_files, hf_tokenizer, model_card, peft
from gptsmith.interop.external_model import ExportableModel, ExternalModel, check_vocabulary
from gptsmith.interop.hf_files import Entry
from gptsmith.interop.hf_mapping import (
    stored_in_transformers,
    tensor_shapes,
    transformers_class,
)
from gptsmith.interop.peft import Adapter
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints

# Buffers that old checkpoints hold and the model computes: causal masks, rotary frequencies.
_BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
_NO_END = (
    "no file says which token ends a text, so generation runs to its maximum length; to name the "
    "token, import the model again with --eos-token NAME"
)
_BASE = "base"


# --- import --------------------------------------------------------------------------------------


def open_folder(folder: Path, ends: Sequence[str] = ()) -> ExternalModel:
    """The model in `folder`, as transformers' save_pretrained writes it.

    ends: tokens that end a text, whatever its files say.

    Raises ValueError or FileNotFoundError naming the file that is missing, damaged, or asks for
    something that our models cannot compute. No code of the folder is run, no pickle opened.
    """
    path = folder / "config.json"
    raw = hf_files.read_json(path)
    config, cls, notes = hf_config.read(raw, path)
    try:
        expected = tensor_shapes(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    entries, tied_head = _weights(folder, expected)
    zero = _absent_biases(raw, expected.keys() - entries.keys())
    given = {name: entry.shape for name, entry in entries.items()}
    state_dict.check_state_dict(
        expected, given | {name: expected[name] for name in zero}, f"{folder} (its config.json)"
    )
    dtype = hf_files.widest(entries)
    tokenizer = hf_tokenizer.read(folder, str(raw["model_type"]))
    tokenizer = tokenizer.with_eos(ends) if ends else tokenizer
    check_vocabulary(
        folder, tokenizer, config, "call resize_token_embeddings in transformers first"
    )
    no_end = [] if tokenizer.special_ids.ends or config.labels else [_NO_END]
    template, unusable = hf_tokenizer.read_template(folder, tokenizer)

    def part(name: str, rows: int, transposed: bool) -> Tensor:
        if name in zero:
            return torch.zeros(rows, dtype=dtype)
        tensor = entries[name].read().to(dtype)
        return tensor.T.contiguous() if transposed else tensor

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for ours, shape in state_dict.shapes(config).items():
            layout = stored_in_transformers(config, ours, shape)
            named = zip(layout.names, layout.rows, strict=True)
            parts = [part(name, rows, layout.transposed) for name, rows in named]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            if ours == "embedding.token.weight" and tied_head is not None:
                _check_tied_head(tied_head, tensor)
            yield ours, tensor

    return ExternalModel(
        config=config,
        tensors=tensors,
        dtype=dtype,
        tokenizer=tokenizer,
        template=template,
        origin={"import": str(folder), "format": "huggingface", "class": cls},
        notes=[*notes, *tokenizer.notes, *no_end, *unusable],
    )


def _weights(folder: Path, expected: Mapping[str, object]) -> tuple[dict[str, Entry], Entry | None]:
    """The tensors of the class, and the head if it is stored though it is tied."""
    entries = hf_files.read_index(folder)
    entries = {name: entry for name, entry in entries.items() if not _BUFFERS.fullmatch(name)}
    # A base model saved alone (GPT2Model) has no prefix in its names.
    prefix, heads = next(iter(expected)).partition(".")[0] + ".", ("lm_head.", "score.")
    if not any(name.startswith(prefix) for name in entries):
        entries = {n if n.startswith(heads) else prefix + n: e for n, e in entries.items()}
    is_tied = not {"lm_head.weight", "score.weight"} & expected.keys()
    return entries, entries.pop("lm_head.weight", None) if is_tied else None


def _absent_biases(raw: Mapping[str, Any], missing: Iterable[str]) -> set[str]:
    """Biases that a Llama with only some of them lacks: ours has all of them or none."""
    attention, mlp = raw.get("attention_bias"), raw.get("mlp_bias")
    if bool(attention) == bool(mlp):
        return set()
    absent = re.compile(rf"model\.layers\.\d+\.{'mlp' if attention else 'self_attn'}\..*\.bias")
    return set(filter(absent.fullmatch, missing))


def _check_tied_head(head: Entry, embedding: Tensor) -> None:
    """Files converted from pickles hold a tied head twice; it must equal the embedding."""
    same = head.shape == embedding.shape and torch.equal(head.read().to(embedding.dtype), embedding)
    if not same:
        raise ValueError(
            f"{head.path}: lm_head.weight differs from the embedding, though config.json ties "
            "them: set its tie_word_embeddings to false"
        )


# --- export --------------------------------------------------------------------------------------


def export(model: ExportableModel, out: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Write the folder `out`, whole or not at all; returns notes for the user.

    dtype: of the weights, by default their own. Raises ValueError for an architecture that no
    class of transformers computes, naming the axis, and for weights that `dtype` cannot hold;
    FileExistsError if `out` is occupied.
    """
    notes = _check(model)
    files.refuse_occupied(out)
    with files.atomic_folder(out) as folder:
        _write_model(folder, model, dtype)
    return notes


def export_adapter(
    base: ExportableModel, adapter: Adapter, out: Path, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a LoRA adapter in peft's form to `out` and the model that it changes to OUT/base.

    dtype: of the base model's weights. Returns and raises as `export` does.
    """
    notes = _check(base)
    files.refuse_occupied(out)
    with files.atomic_folder(out) as folder:
        (folder / _BASE).mkdir()
        _write_model(folder / _BASE, base, dtype)
        hf_tokenizer.write(folder, base)
        # absolute, because peft resolves it against the working directory
        peft.save(folder, base.config, adapter, base_model=str(out.resolve() / _BASE))
        files.write_text(folder / "README.md", model_card.adapter_text(base, adapter.lora))
    return notes


def _check(model: ExportableModel) -> list[str]:
    """Whether the model can be exported, before its weights are read; notes for the user."""
    config, tokenizer = model.config, model.tokenizer
    cls, notes = transformers_class(config), []
    if _opens_as_llama(config, tokenizer):
        other = transformers_class(config.change(bias="all"))
        notes.append(
            f"written as {other} with zero biases: transformers gives every {cls} Qwen's tokenizer"
        )
    check_vocabulary(model.name, tokenizer, config)
    if padding := config.vocab_size - tokenizer.vocab_size:
        notes.append(f"{padding:,} rows that pad the vocabulary are left out")
    return notes


def _opens_as_llama(config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether a Qwen2 is written as a Llama with zero biases, which computes the same: as a Qwen2,
    transformers would open it with another tokenizer."""
    return config.bias == "qkv" and not hf_tokenizer.splits_as_qwen2(tokenizer)


def _write_model(folder: Path, model: ExportableModel, dtype: torch.dtype | None) -> None:
    tokenizer, tensors = model.tokenizer, model.tensors()
    config = model.config.change(vocab_size=tokenizer.vocab_size)
    if _opens_as_llama(config, tokenizer):
        config = config.change(bias="all")
    if dtype is None:
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    ids = hf_tokenizer.config_ids(tokenizer, bool(config.labels))
    files.write_json(folder / "config.json", hf_config.config_json(config, dtype, ids))
    if not config.labels:
        stop_ids = () if model.chat_template is None else model.chat_template.stop_ids
        generation = hf_tokenizer.generation_config(tokenizer, stop_ids)
        files.write_json(folder / "generation_config.json", generation)
    hf_tokenizer.write(folder, model)
    layout = {name: (dtype, shape) for name, shape in tensor_shapes(config).items()}
    theirs = _in_transformers(config, tensors, dtype)
    checkpoints.stream_tensors(folder / hf_files.SINGLE, layout, theirs)
    files.write_text(folder / "README.md", model_card.text(model, config, dtype))


def _in_transformers(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the class of `config`; biases that ours lacks are zero, and rows that pad our
    vocabulary are cut."""
    for ours, shape in state_dict.shapes(config).items():
        tensor = tensors[ours] if ours in tensors else torch.zeros(shape)
        layout = stored_in_transformers(config, ours, shape)
        rows = tensor[: shape[0]].split(layout.rows)
        for name, part in zip(layout.names, rows, strict=True):
            part = part.to(dtype)
            if not part.isfinite().all():
                raise ValueError(
                    f"{ours} has values that {str(dtype).removeprefix('torch.')} cannot hold: "
                    "export it with --dtype bf16 or fp32"
                )
            yield name, (part.T if layout.transposed else part).contiguous()

"""Import and export of transformers model folders. No custom code is needed or run."""

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
from gptsmith.interop.hf_files import StoredTensor
from gptsmith.interop.hf_mapping import (
    tensor_shapes,
    transformers_class,
    transformers_layout,
)
from gptsmith.interop.peft import Adapter
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints

# Buffers in old checkpoints that the model recomputes: causal masks, rotary frequencies.
_BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
_NO_EOS = (
    "no file says which token ends a text, so generation runs to its maximum length; to name the "
    "token, import the model again with --eos-token NAME"
)
_BASE = "base"


# --- import --------------------------------------------------------------------------------------


def open_folder(folder: Path, eos_tokens: Sequence[str] = ()) -> ExternalModel:
    """The model in `folder`, as transformers' save_pretrained writes it.

    eos_tokens: names of the tokens that end a text, overriding the model's files.

    Raises ValueError or FileNotFoundError naming the file that is missing, damaged, or describes an
    unsupported model. No code in the folder is run and no pickle is opened.
    """
    path = folder / "config.json"
    raw = hf_files.read_json(path)
    config, cls, notes = hf_config.read(raw, path)
    try:
        expected = tensor_shapes(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    stored, tied_head = _weights(folder, expected)
    zero = _absent_biases(raw, expected.keys() - stored.keys())
    given = {name: tensor.shape for name, tensor in stored.items()}
    state_dict.check_state_dict(
        expected, given | {name: expected[name] for name in zero}, f"{folder} (its config.json)"
    )
    dtype = hf_files.widest_dtype(stored)
    tokenizer = hf_tokenizer.read(folder, str(raw["model_type"]))
    tokenizer = tokenizer.with_eos(eos_tokens) if eos_tokens else tokenizer
    check_vocabulary(
        folder, tokenizer, config, "call resize_token_embeddings in transformers first"
    )
    no_eos = [] if tokenizer.special_ids.eos_ids or config.labels else [_NO_EOS]
    template, template_notes = hf_tokenizer.read_template(folder, tokenizer)

    def part(name: str, rows: int, transposed: bool) -> Tensor:
        if name in zero:
            return torch.zeros(rows, dtype=dtype)
        tensor = stored[name].read().to(dtype)
        return tensor.T.contiguous() if transposed else tensor

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for ours, shape in state_dict.shapes(config).items():
            layout = transformers_layout(config, ours, shape)
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
        notes=[*notes, *tokenizer.notes, *no_eos, *template_notes],
    )


def _weights(
    folder: Path, expected: Mapping[str, object]
) -> tuple[dict[str, StoredTensor], StoredTensor | None]:
    """The tensors of the class, and separately a head that is stored although it is tied."""
    stored = hf_files.read_index(folder)
    stored = {name: tensor for name, tensor in stored.items() if not _BUFFERS.fullmatch(name)}
    # A base model saved alone (GPT2Model) has no prefix in its names.
    prefix, heads = next(iter(expected)).partition(".")[0] + ".", ("lm_head.", "score.")
    if not any(name.startswith(prefix) for name in stored):
        stored = {n if n.startswith(heads) else prefix + n: t for n, t in stored.items()}
    is_tied = not {"lm_head.weight", "score.weight"} & expected.keys()
    return stored, stored.pop("lm_head.weight", None) if is_tied else None


def _absent_biases(raw: Mapping[str, Any], missing: Iterable[str]) -> set[str]:
    """The biases that a Llama with biases in attention or MLP only lacks; they are imported as
    zeros, because our models have all of them or none."""
    attention, mlp = raw.get("attention_bias"), raw.get("mlp_bias")
    if bool(attention) == bool(mlp):
        return set()
    absent = re.compile(rf"model\.layers\.\d+\.{'mlp' if attention else 'self_attn'}\..*\.bias")
    return set(filter(absent.fullmatch, missing))


def _check_tied_head(head: StoredTensor, embedding: Tensor) -> None:
    """ValueError unless a tied head that is stored too (files converted from pickles) equals the
    embedding."""
    same = head.shape == embedding.shape and torch.equal(head.read().to(embedding.dtype), embedding)
    if not same:
        raise ValueError(
            f"{head.path}: lm_head.weight differs from the embedding, though config.json ties "
            "them: set its tie_word_embeddings to false"
        )


# --- export --------------------------------------------------------------------------------------


def export(model: ExportableModel, out: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Write the folder `out`, completely or not at all; returns notes for the user.

    dtype: of the weights, by default their own. Raises ValueError for an architecture that no
    transformers class implements, naming the setting, and for weights that `dtype` cannot
    represent; FileExistsError if `out` exists and is not empty.
    """
    notes = _check_exportable(model)
    with files.atomic_folder(out) as folder:
        _write_model(folder, model, dtype)
    return notes


def export_adapter(
    base: ExportableModel, adapter: Adapter, out: Path, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a LoRA adapter in peft's format to `out`, and its base model to OUT/base.

    dtype: of the base model's weights. Returns and raises as `export` does.
    """
    notes = _check_exportable(base)
    with files.atomic_folder(out) as folder:
        (folder / _BASE).mkdir()
        _write_model(folder / _BASE, base, dtype)
        hf_tokenizer.write(folder, base)
        # absolute, because peft resolves it against the working directory
        peft.save(folder, base.config, adapter, base_model=str(out.resolve() / _BASE))
        files.write_text(folder / "README.md", model_card.adapter_text(base, adapter.lora))
    return notes


def _check_exportable(model: ExportableModel) -> list[str]:
    """Check, before its weights are read, that the model can be exported; returns notes."""
    config, tokenizer = model.config, model.tokenizer
    cls, notes = transformers_class(config), []
    if _is_written_as_llama(config, tokenizer):
        other = transformers_class(config.change(bias="all"))
        notes.append(
            f"written as {other} with zero biases: transformers gives every {cls} Qwen's tokenizer"
        )
    check_vocabulary(model.name, tokenizer, config)
    if padding := config.vocab_size - tokenizer.vocab_size:
        notes.append(f"{padding:,} rows that pad the vocabulary are left out")
    return notes


def _is_written_as_llama(config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether a Qwen2 is written as a Llama with zero biases, which computes the same, because
    transformers opens every Qwen2 with Qwen's tokenizer."""
    return config.bias == "qkv" and not hf_tokenizer.splits_as_qwen2(tokenizer)


def _write_model(folder: Path, model: ExportableModel, dtype: torch.dtype | None) -> None:
    tokenizer, tensors = model.tokenizer, model.tensors()
    config = model.config.change(vocab_size=tokenizer.vocab_size)
    if _is_written_as_llama(config, tokenizer):
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
    theirs = _transformers_tensors(config, tensors, dtype)
    checkpoints.stream_tensors(folder / hf_files.SINGLE, layout, theirs)
    files.write_text(folder / "README.md", model_card.text(model, config, dtype))


def _transformers_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the transformers class, by its names: missing biases are zeros, and the rows
    that pad our vocabulary are cut off."""
    for ours, shape in state_dict.shapes(config).items():
        tensor = tensors[ours] if ours in tensors else torch.zeros(shape)
        layout = transformers_layout(config, ours, shape)
        rows = tensor[: shape[0]].split(layout.rows)
        for name, part in zip(layout.names, rows, strict=True):
            part = part.to(dtype)
            if not part.isfinite().all():
                raise ValueError(
                    f"{ours} has values that {str(dtype).removeprefix('torch.')} cannot hold: "
                    "export it with --dtype bf16 or fp32"
                )
            yield name, (part.T if layout.transposed else part).contiguous()

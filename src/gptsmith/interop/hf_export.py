"""A run as a folder that stock transformers opens: no code of ours is needed there."""

from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith import files
from gptsmith.interop import hf_tokenizer, model_card
from gptsmith.interop.huggingface import config_json, tensor_shapes
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.stock import place, stock_class
from gptsmith.run import Run, Which, layout
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints

_BASE = "base"


def export(
    run: Run,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    checkpoint: Which = "last",
    adapter: bool = False,
) -> list[str]:
    """Write the folder `out`, whole or not at all; returns what the user should hear.

    dtype: of the weights, by default that of the run. adapter: of a LoRA run, peft's adapter with
    the model that it started from in OUT/base, instead of the two merged.
    Raises ValueError for an architecture without a stock class, naming the axis, and for weights
    that `dtype` cannot hold; FileExistsError if `out` is occupied.
    """
    config, tokenizer = run.model_config, run.tokenizer
    cls, notes = stock_class(config), []
    if _opens_as_llama(config, tokenizer):
        other = stock_class(config.change(bias="all"))
        notes.append(f"written as {other} with biases of zero: every {cls} gets Qwen's tokenizer")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{run.path}: {tokenizer.vocab_size:,} tokens, but the model has vectors for "
            f"{config.vocab_size:,}: they do not belong together"
        )
    if adapter and not run.tuning.lora.rank:
        raise ValueError(f"{run.path} has no adapter, it was not tuned with LoRA")
    files.refuse_occupied(out)
    model = run.base_model() if adapter else run.load_model(checkpoint)
    with files.atomic_folder(out) as folder:
        if adapter:
            (folder / _BASE).mkdir()
            _write_model(folder / _BASE, run, model, dtype)
            _write_adapter(folder, run, checkpoint, out)
        else:
            _write_model(folder, run, model, dtype)
    if run.notice:
        notes.append(run.notice)
    if cut := config.vocab_size - tokenizer.vocab_size:
        notes.append(f"{cut:,} rows that padded the vocabulary are left out")
    return notes


def _opens_as_llama(config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether a Qwen2 is better off as the Llama that it is, apart from biases that are zero:
    transformers would open its tokenizer as another one."""
    return config.bias == "qkv" and not hf_tokenizer.splits_as_qwen2(tokenizer)


def _write_model(folder: Path, run: Run, model: GPTModel, dtype: torch.dtype | None) -> None:
    tokenizer, tensors = run.tokenizer, model.state_dict()
    config = model.config.change(vocab_size=tokenizer.vocab_size)
    if _opens_as_llama(config, tokenizer):
        config = config.change(bias="all")
    if dtype is None:
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    names = hf_tokenizer.roles(tokenizer)
    tokens = {role: tokenizer.special_tokens[name] for role, name in names.items()}
    ids = {f"{role}_id": tokens.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    files.write_json(folder / "config.json", config_json(config, dtype, ids))
    if not config.labels:
        generation: dict[str, Any] = dict(ids)
        if run.chat_template is not None:
            generation["eos_token_id"] = [*run.chat_template.stop_ids]
        if "bos_token" not in tokens:  # what has no prompt begins behind the end of another text
            generation["bos_token_id"] = ids["eos_token_id"]
        files.write_json(folder / "generation_config.json", generation)
    hf_tokenizer.write(folder, tokenizer, run.template, config.context_length)
    checkpoints.stream_tensors(
        folder / "model.safetensors",
        tensor_shapes(config),
        dtype,
        _theirs(config, tensors, dtype),
    )
    files.write_text(folder / "README.md", model_card.text(run, config, dtype))


def _theirs(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for ours, shape in state_dict.shapes(config).items():
        tensor = tensors[ours] if ours in tensors else torch.zeros(shape)
        there = place(config, ours, shape[0])
        rows = tensor[: shape[0]].split(there.rows)  # an embedding may have more, for padding
        for name, part in zip(there.names, rows, strict=True):
            part = part.to(dtype)
            if not part.isfinite().all():
                raise ValueError(
                    f"{ours} has numbers that {str(dtype).removeprefix('torch.')} cannot hold: "
                    "export it with --dtype bf16 or fp32"
                )
            yield name, (part.T if there.transposed else part).contiguous()


def _write_adapter(folder: Path, run: Run, checkpoint: Which, out: Path) -> None:
    """peft's two files, and the tokenizer with the new tokens."""
    hf_tokenizer.write(folder, run.tokenizer, run.template, run.model_config.context_length)
    tensors, stored = run.load_adapter(checkpoint)
    # peft resolves it where the program runs, so a relative path would not do
    stored["base_model_name_or_path"] = str(out.resolve() / _BASE)
    files.write_json(folder / layout.ADAPTER_CONFIG, stored)
    checkpoints.save_tensors(folder / layout.ADAPTER_WEIGHTS, tensors)
    files.write_text(folder / "README.md", model_card.adapter_text(run))

"""OpenAI's GPT-2 as it was published: a TensorFlow checkpoint, hparams.json and two BPE tables.

A folder: hparams.json, checkpoint (names the newest), NAME.index, NAME.data-0000i-of-0000n,
encoder.json, vocab.bpe. Those that gpt-2-simple and nshepperd's fine-tuning wrote have the same
form, with the optimizer's variables between, which are left out. Names and shapes: src/model.py of
github.com/openai/gpt-2.
"""

import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from gptsmith import files
from gptsmith.interop import tf_bundle
from gptsmith.interop.external_model import ExternalModel, config_error
from gptsmith.interop.tf_bundle import Entry
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_ctx": "context_length",
    "n_vocab": "vocab_size",
}
# Ours: theirs. A matrix is stored as (1, in, out), the kernel of a convolution of width 1.
_TOP = {
    "embedding.token.weight": "model/wte",
    "embedding.position.weight": "model/wpe",
    "final_norm.weight": "model/ln_f/g",
    "final_norm.bias": "model/ln_f/b",
}
_BLOCK = {
    "attention_norm.weight": "ln_1/g",
    "attention_norm.bias": "ln_1/b",
    "attention.qkv.weight": "attn/c_attn/w",
    "attention.qkv.bias": "attn/c_attn/b",
    "attention.proj.weight": "attn/c_proj/w",
    "attention.proj.bias": "attn/c_proj/b",
    "mlp_norm.weight": "ln_2/g",
    "mlp_norm.bias": "ln_2/b",
    "mlp.up.weight": "mlp/c_fc/w",
    "mlp.up.bias": "mlp/c_fc/b",
    "mlp.down.weight": "mlp/c_proj/w",
    "mlp.down.bias": "mlp/c_proj/b",
}


def open_folder(folder: Path) -> ExternalModel:
    """The GPT-2 in `folder`; its tensors are read, and their checksums compared, one at a time.

    Raises ValueError or FileNotFoundError, naming the file that is missing, damaged or of another
    architecture.
    """
    prefix = _newest(folder)
    entries = tf_bundle.read_index(prefix)
    config = _config(folder / "hparams.json", entries)
    names = dict(_TOP)
    for i in range(config.n_layer):
        names |= {f"blocks.{i}.{ours}": f"model/h{i}/{name}" for ours, name in _BLOCK.items()}
    wanted = {ours: _find(entries, name, prefix) for ours, name in names.items()}
    _refuse_others(entries, set(names.values()), prefix, folder / "hparams.json")
    given = {
        ours: entry.shape[:0:-1] if len(entry.shape) == 3 else entry.shape
        for ours, entry in wanted.items()
    }
    state_dict.check_state_dict(state_dict.shapes(config), given, prefix)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, hparams.json says n_vocab "
            f"{config.vocab_size}: these files do not belong together"
        )
    dtype = reduce(torch.promote_types, (_dtype(entry) for entry in wanted.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for ours, entry in wanted.items():
            tensor = tf_bundle.read_tensor(entry).to(dtype)
            yield ours, tensor.squeeze(0).T.contiguous() if tensor.dim() == 3 else tensor

    return ExternalModel(
        config=config,
        tensors=tensors,
        dtype=dtype,
        tokenizer=tokenizer,
        template=None,
        origin={"import": str(folder), "format": "openai-tensorflow", "checkpoint": prefix.name},
        notes=[],
    )


def _newest(folder: Path) -> Path:
    """FOLDER/NAME of the checkpoint that the file `checkpoint` names, or of the only one."""
    named = folder / "checkpoint"
    if named.is_file():
        text = named.read_text(encoding="utf-8", errors="replace")[:10_000]
        if found := re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE):
            # it may be an absolute path on the machine that trained
            name = found[1].replace("\\", "/").rpartition("/")[2]
            if not (folder / f"{name}.index").is_file():
                raise FileNotFoundError(f"{folder / name}.index: missing, {named} names it")
            return folder / name
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise ValueError(
            f"{folder} has {len(indices) or 'no'} checkpoints (NAME.index): expected one, or "
            f'{named.name} with a line model_checkpoint_path: "NAME"'
        )
    return indices[0].with_suffix("")


def _config(path: Path, entries: dict[str, Entry]) -> ModelConfig:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected one JSON object of sizes")
    sizes = {}
    for theirs, ours in _SIZES.items():
        value = content.get(theirs)
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {theirs} is {value!r}, expected a number above 0")
        sizes[ours] = value
    if sizes["n_layer"] > len(entries):  # before anything is made of that many layers
        raise ValueError(
            f"{path}: n_layer {sizes['n_layer']}, but the checkpoint has {len(entries)} variables"
        )
    try:
        config = ModelConfig.preset("gpt2", **sizes)
    except ValidationError as error:
        raise config_error(path, error, {ours: theirs for theirs, ours in _SIZES.items()}) from None
    C, T, V = config.n_embd, config.context_length, config.vocab_size
    for name, shape in (("model/wte", (V, C)), ("model/wpe", (T, C))):
        if name in entries and entries[name].shape != shape:
            raise ValueError(f"{path} asks for {name} {shape}, it is {entries[name].shape}")
    return config


def _find(entries: dict[str, Entry], name: str, prefix: Path) -> Entry:
    if name not in entries:
        raise ValueError(f"{prefix}.index has no variable {name}: it is no GPT-2 of OpenAI's form")
    entry = entries[name]
    if entry.dtype is None or (len(entry.shape) == 3 and entry.shape[0] != 1):
        raise ValueError(f"{prefix}: {name} {entry.shape} is no matrix or vector of numbers")
    return entry


def _refuse_others(
    entries: dict[str, Entry], wanted: set[str], prefix: Path, hparams: Path
) -> None:
    """ValueError for a variable of a larger or other model. The optimizer's stand below
    (model/wte/Adam) or beside (beta1_power, global_step)."""
    for name in entries.keys() - wanted:
        above = {name.rsplit("/", n)[0] for n in range(1, name.count("/"))}
        if name.startswith("model/") and not above & wanted:
            raise ValueError(f"{prefix} has a variable {name} that {hparams} does not account for")


def _dtype(entry: Entry) -> torch.dtype:
    assert entry.dtype is not None
    return entry.dtype

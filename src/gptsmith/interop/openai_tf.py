"""OpenAI's GPT-2 as it was published: a TensorFlow checkpoint, hparams.json and two BPE tables.

A folder: hparams.json, checkpoint (names the newest), NAME.index, NAME.data-0000i-of-0000n,
encoder.json, vocab.bpe. gpt-2-simple and nshepperd's fine-tuning write the same form, with the
optimizer's variables in it, which are ignored. Names and shapes: src/model.py of
github.com/openai/gpt-2.
"""

import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from gptsmith import files
from gptsmith.interop import tf_bundle
from gptsmith.interop.external_model import ExternalModel, check_vocabulary, config_from
from gptsmith.interop.hf_mapping import GPT2_NAMES, stored
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


def open_folder(folder: Path) -> ExternalModel:
    """The GPT-2 in `folder`; its tensors are read and their checksums verified one at a time.

    Raises ValueError or FileNotFoundError, naming the file that is missing, damaged or of another
    architecture.
    """
    prefix = _newest(folder)
    entries = tf_bundle.read_index(prefix)
    config = _config(folder / "hparams.json", entries)
    shapes = state_dict.shapes(config)
    names = {
        ours: _variable(stored(config, GPT2_NAMES, ours, shape[0]).names[0])
        for ours, shape in shapes.items()
    }
    wanted = {ours: _find(entries, name, prefix) for ours, name in names.items()}
    _refuse_others(entries, set(names.values()), prefix, folder / "hparams.json")
    given = {  # a matrix is (1, in, out), the kernel of a convolution of width 1
        ours: entry.shape[:0:-1] if len(entry.shape) == 3 else entry.shape
        for ours, entry in wanted.items()
    }
    state_dict.check_state_dict(shapes, given, prefix)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(folder, tokenizer, config)
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


def _variable(name: str) -> str:
    """The name of a tensor of transformers' GPT-2 in TensorFlow: transformer.h.0.ln_1.weight is
    model/h0/ln_1/g."""
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    path = re.sub(r"^h\.", "h", module).replace(".", "/")
    if module in ("wte", "wpe"):
        return f"model/{path}"
    weight = "g" if path.rpartition("/")[2].startswith("ln_") else "w"
    return f"model/{path}/{weight if kind == 'weight' else 'b'}"


def _newest(folder: Path) -> Path:
    """FOLDER/NAME of the checkpoint that the file `checkpoint` names, or of the only one."""
    named = folder / "checkpoint"
    if named.is_file():
        text = named.read_text(encoding="utf-8", errors="replace")[:10_000]
        if found := re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE):
            # possibly an absolute path on the machine that trained it
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
    n_layer = content.get("n_layer")
    if isinstance(n_layer, int) and n_layer > len(entries):
        # checked first, because the model is then laid out with that many layers
        raise ValueError(
            f"{path}: n_layer {n_layer}, but the checkpoint has {len(entries)} variables"
        )
    config = config_from(content, _SIZES, path)
    C, T, V = config.n_embd, config.context_length, config.vocab_size
    for name, shape in (("model/wte", (V, C)), ("model/wpe", (T, C))):
        if name in entries and entries[name].shape != shape:
            raise ValueError(f"{path}: {name} should be {shape}, but is {entries[name].shape}")
    return config


def _find(entries: dict[str, Entry], name: str, prefix: Path) -> Entry:
    if name not in entries:
        raise ValueError(f"{prefix}.index has no variable {name}: this is not OpenAI's GPT-2")
    entry = entries[name]
    if entry.dtype is None or (len(entry.shape) == 3 and entry.shape[0] != 1):
        raise ValueError(f"{prefix}: {name} {entry.shape} is not a matrix or vector of floats")
    return entry


def _refuse_others(
    entries: dict[str, Entry], wanted: set[str], prefix: Path, hparams: Path
) -> None:
    """ValueError for a variable of a larger or other model. The optimizer's are below ours
    (model/wte/Adam) or outside model/ (beta1_power, global_step)."""
    for name in entries.keys() - wanted:
        above = {name.rsplit("/", n)[0] for n in range(1, name.count("/"))}
        if name.startswith("model/") and not above & wanted:
            raise ValueError(f"{prefix} has a variable {name} that {hparams} does not account for")


def _dtype(entry: Entry) -> torch.dtype:
    assert entry.dtype is not None
    return entry.dtype

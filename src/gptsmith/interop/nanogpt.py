"""Import nanoGPT checkpoints (ckpt.pt of github.com/karpathy/nanoGPT): GPT-2, saved by torch.

A .pt file is a zip of tensors and one pickle. It is opened with weights_only=True, which builds
only tensors and plain containers and runs no code from the file; tensors are memory-mapped. Names
are those of GPT-2 in transformers, matrices are (out, in) like ours.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.interop.external_model import ExternalModel, config_from
from gptsmith.interop.hf_mapping import gpt2_names
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "context_length",
    "vocab_size": "vocab_size",
}
_GPT2_VOCABULARIES = (50257, 50304)  # exact, and rounded up to a multiple of 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The globals that the pickle of a state dict refers to. torch allows more, such as `bytearray` of
# any size.
_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch ((Float|Half|BFloat16|Double|Long|Int|Short|Char|Byte|Bool)Storage|Size)"
)
_MAX_PICKLE = 16 << 20  # bytes; that of GPT-2 1558M with its optimizer has 0.3 million
_MAX_OPERATIONS = 2_000_000

# nanoGPT's pull request 274; a checkpoint does not say whether it is older. The figure is that of a
# character model (4 layers, 128 wide), whose most likely token was the same everywhere.
_GELU = (
    "imported with nanoGPT's exact GELU (gelu_erf), used since June 2023; for an older checkpoint "
    "set mlp to gelu in model.json (logits differ by up to 0.01)"
)


def open_file(path: Path) -> ExternalModel:
    """The model in a ckpt.pt of nanoGPT, with the tokenizer.json in its folder, or else GPT-2's.

    Raises ValueError, in one line, for a file that is damaged, contains code, or has another
    architecture.
    """
    content = _load(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(
            f"{path} is not a nanoGPT checkpoint: expected a dict with 'model' and 'model_args'"
        )
    state = _tensors(content["model"], path)
    config = _config(content["model_args"], state, path)
    tokenizer, notes = _tokenizer(path, config)
    names = gpt2_names(config, {name: tuple(t.shape) for name, t in state.items()}, path)
    rows = tokenizer.vocab_size - config.vocab_size
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for ours, name in names.items():
            tensor = state[name]
            if rows > 0 and ours in ("embedding.token.weight", "head.weight"):
                # as state_dict.resize_token_embeddings does it
                mean = tensor.float().mean(dim=0).to(tensor.dtype)  # (C,)
                tensor = torch.cat([tensor, mean.expand(rows, -1)])  # (V, C)
            yield ours, tensor.to(dtype)

    origin: dict[str, str | int] = {"import": str(path), "format": "nanogpt"}
    if isinstance(step := content.get("iter_num"), int):
        origin["step"] = step
    return ExternalModel(
        config=config.change(vocab_size=config.vocab_size + max(rows, 0)),
        tensors=tensors,
        dtype=dtype,
        tokenizer=tokenizer,
        template=None,
        origin=origin,
        notes=[_GELU, *notes],
    )


def _load(path: Path) -> Any:
    """The saved object. ValueError unless it consists of tensors and plain containers."""
    try:
        archive = zipfile.ZipFile(path)
    # zipfile raises NotImplementedError for compression methods that it does not know.
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise ValueError(
            f"{path} is damaged or not saved by PyTorch 1.6 or newer (it is not a zip file): "
            "download it again, or, if you trust it, load and save it with a newer torch"
        ) from None
    with archive:
        # torch.save never compresses, so what is read is never larger than the file.
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError(
                f"{path} is a compressed zip, which torch.save never writes: not opened"
            )
        pickles = [r for r in archive.infolist() if r.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
            raise ValueError(f"{path} is not a checkpoint: it should have one data.pkl of 16 MB")
        try:
            _check_pickle(archive.read(pickles[0]))
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # of zipfile, pickletools and torch, for damaged bytes
            # torch's message starts with advice on how to open it anyway
            why = re.split(r"trusted source\.|WeightsUnpickler error:", str(error))[-1]
            raise ValueError(
                f"{path} is not opened ({' '.join(why.split())[:150]}): a pickle can run code, so "
                "only tensors and plain values are read"
            ) from None


def _check_pickle(data: bytes) -> None:
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if count > _MAX_OPERATIONS:
            raise ValueError(f"more than {_MAX_OPERATIONS:,} operations")
        named = operation.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
        if named and not _ALLOWED_GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it asks for {str(argument).replace(' ', '.')!r:.80}")


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by nanoGPT's names; a head that equals the embedding is left out."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and name.isprintable() for name in state
    ):
        raise ValueError(f"{path}: 'model' is not a dict of tensors by name")
    tensors = {}
    for key, tensor in state.items():
        name = key.removeprefix("_orig_mod.")  # of torch.compile
        if re.fullmatch(r"transformer\.h\.\d+\.attn\.bias", name):
            continue  # the causal mask, which old versions saved
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in _DTYPES
            # an expanded tensor, such as one number repeated a billion times
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise ValueError(f"{path}: {key!r} is not a dense tensor of floating-point numbers")
        tensors[name] = tensor.detach()
    head, token = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
    if head is not None and token is not None and torch.equal(head, token):
        del tensors["lm_head.weight"]
    return tensors


def _config(args: Any, state: dict[str, Tensor], path: Path) -> ModelConfig:
    if not isinstance(args, dict):
        raise ValueError(f"{path}: 'model_args' is not a dict")
    for name, value in args.items():
        if name not in (*_SIZES, "bias", "dropout") and value not in (None, False):
            raise ValueError(
                f"{path}: model_args has {name} {value!r}, which is not an option of nanoGPT"
            )
    return config_from(
        args,
        _SIZES,
        path,
        mlp="gelu_erf",
        bias="all" if args.get("bias", True) else "none",
        dropout=args.get("dropout", 0.0),
        tie_embeddings="lm_head.weight" not in state,
    )


def _tokenizer(path: Path, config: ModelConfig) -> tuple[Tokenizer, list[str]]:
    """The tokenizer in the checkpoint's folder, or GPT-2's, and notes for the user."""
    V, file = config.vocab_size, path.with_name("tokenizer.json")
    if file.is_file():
        tokenizer = Tokenizer.load(file)
    elif V in _GPT2_VOCABULARIES:
        tokenizer = Tokenizer.gpt2()
    else:
        raise ValueError(
            f"{path} holds no tokenizer, and meta.pkl, a pickle, is not read: put tokenizer.json "
            "into its folder; for a character model, gptsmith prepare TEXT --tokenizer char "
            "--out data/NAME makes one"
        )
    used = tokenizer.vocab_size
    if used <= V:  # padding stays: the model was trained with it
        return tokenizer, []
    new = [name for name, i in tokenizer.special_tokens.items() if i >= V]
    if len(new) < used - V:
        raise ValueError(
            f"{file} has {used} ids, {path.name} a vocabulary of {V}: they do not belong together"
        )
    return tokenizer, [f"untrained rows were added for {', '.join(new)}"]

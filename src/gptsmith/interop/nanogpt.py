"""nanoGPT's checkpoints (ckpt.pt of github.com/karpathy/nanoGPT): GPT-2's network, saved by torch.

A .pt file is a zip of tensors and one pickle. torch opens it with weights_only=True, which builds
tensors and plain containers and runs no code of the file, or not at all; tensors stay in the file
until they are reached.
"""

import re
import zipfile
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gptsmith.interop.external_model import ExternalModel, config_error
from gptsmith.model import state_dict
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "context_length",
    "vocab_size": "vocab_size",
}
_NAMES = {
    "transformer.wte": "embedding.token",
    "transformer.wpe": "embedding.position",
    "transformer.ln_f": "final_norm",
    "lm_head": "head",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.proj",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_GPT2_VOCABULARIES = (50257, 50304)  # as it is, and rounded up to a multiple of 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Its pull request 274. A checkpoint does not say of which side it is. The figure is that of a
# character model (4 layers, 128 wide), whose likeliest token was the same everywhere.
_GELU = (
    "nanoGPT computes GELU by erf since June 2023, and this model does so; it had the tanh form "
    "before: for such a checkpoint write gelu instead of gelu_erf into model.json (logits differ "
    "by up to 0.01)"
)


def open_file(path: Path) -> ExternalModel:
    """The model in a ckpt.pt of nanoGPT, with the tokenizer.json beside it, or else GPT-2's.

    Raises ValueError, in one line, for a file that is damaged, holds code, or is of another
    architecture.
    """
    content = _load(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(
            f"{path} is no checkpoint of nanoGPT: expected a dict with 'model' and 'model_args'"
        )
    state = _ours(content["model"], path)
    config = _config(content["model_args"], state, path)
    tokenizer, notes = _tokenizer(path, config)
    state_dict.check_state_dict(
        state_dict.shapes(config), {name: tuple(t.shape) for name, t in state.items()}, path
    )
    rows = tokenizer.vocab_size - config.vocab_size
    tables = ("embedding.token.weight", "head.weight")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            if rows > 0 and name in tables:  # as grow_vocabulary does it
                mean = tensor.float().mean(dim=0).to(tensor.dtype)  # (C,)
                tensor = torch.cat([tensor, mean.expand(rows, -1)])  # (V, C)
            yield name, tensor.to(dtype)

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
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise ValueError(
            f"{path} is damaged or no checkpoint of PyTorch 1.6 or newer (no zip file inside): "
            "fetch it again, or, if you trust it, load and save it with a newer torch"
        ) from None
    # torch.save never compresses, so what is read is never larger than the file.
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path} is a compressed zip: torch.save writes none, it is not opened")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of the zip, of the pickle, of what it asks torch to build
        # torch begins with how to open it all the same
        said = re.split(r"trusted source\.|WeightsUnpickler error:", str(error))[-1].strip()
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asked[1]!r}" if asked else said.partition("\n")[0][:150]
        raise ValueError(
            f"{path} is not opened ({why}): a pickle can run code, so only tensors and plain"
            " values are read"
        ) from None


def _ours(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by our names; a head that is the embedding is left out."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and name.isprintable() for name in state
    ):
        raise ValueError(f"{path}: 'model' is no dict of tensors by name")
    tensors = {}
    for key, tensor in state.items():
        name = key.removeprefix("_orig_mod.")  # of torch.compile
        if re.fullmatch(r"transformer\.h\.\d+\.attn\.bias", name):
            continue  # the causal mask, which old versions saved
        block = re.match(r"transformer\.h\.(\d+)\.", name)
        module, _, kind = name.removeprefix(block[0] if block else "").rpartition(".")
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in _DTYPES
            # such as one number that is repeated a billion times
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise ValueError(f"{path}: {key!r} is no plain tensor of floating-point numbers")
        ours = f"{_NAMES.get(module, module)}.{kind}"
        tensors[f"blocks.{block[1]}.{ours}" if block else ours] = tensor.detach()
    head, token = tensors.get("head.weight"), tensors.get("embedding.token.weight")
    if head is not None and token is not None and torch.equal(head, token):
        del tensors["head.weight"]
    return tensors


def _config(args: Any, state: dict[str, Tensor], path: Path) -> ModelConfig:
    if not isinstance(args, dict):
        raise ValueError(f"{path}: 'model_args' is no dict")
    sizes = {}
    for theirs, ours in _SIZES.items():
        value = args.get(theirs)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{path}: model_args has {theirs} {value!r}, expected a number above 0"
            )
        sizes[ours] = value
    for name, value in args.items():
        if name not in (*_SIZES, "bias", "dropout") and value not in (None, False):
            raise ValueError(
                f"{path}: model_args has {name} {value!r}, which nanoGPT's own network does not"
            )
    C, T, V = sizes["n_embd"], sizes["context_length"], sizes["vocab_size"]
    # before anything is made in these sizes
    for name, shape in (("token", (V, C)), ("position", (T, C))):
        tensor = state.get(f"embedding.{name}.weight")
        if tensor is None or tensor.shape != shape:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{path}: the {name} embedding is {found}, model_args says {shape}")
    if sizes["n_layer"] > len(state):
        raise ValueError(
            f"{path}: model_args has n_layer {sizes['n_layer']}, 'model' {len(state)} tensors"
        )
    dropout = args.get("dropout", 0.0)
    try:
        return ModelConfig.preset(
            "gpt2",
            **sizes,
            mlp="gelu_erf",
            bias="all" if args.get("bias", True) else "none",
            dropout=dropout if isinstance(dropout, int | float) else 0.0,
            tie_embeddings="head.weight" not in state,
        )
    except ValidationError as error:
        raise config_error(path, error, {ours: theirs for theirs, ours in _SIZES.items()}) from None


def _tokenizer(path: Path, config: ModelConfig) -> tuple[Tokenizer, list[str]]:
    """The tokenizer beside the checkpoint, or GPT-2's, and what the user should hear."""
    V, beside = config.vocab_size, path.with_name("tokenizer.json")
    if beside.is_file():
        tokenizer = Tokenizer.load(beside)
    elif V in _GPT2_VOCABULARIES:
        tokenizer = Tokenizer.gpt2()
    else:
        raise ValueError(
            f"{path} holds no tokenizer, and meta.pkl, a pickle, is not read: put its tokenizer as "
            f"tokenizer.json beside it; for characters, gptsmith prepare TEXT --tokenizer char "
            "--out data/NAME makes data/NAME/tokenizer.json"
        )
    used = tokenizer.vocab_size
    if used <= V:  # padding stays: the model was trained with it
        return tokenizer, []
    new = [name for name, i in tokenizer.special_tokens.items() if i >= V]
    if len(new) < used - V:
        raise ValueError(
            f"{beside} has {used} ids, {path.name} a vocabulary of {V}: they do not belong together"
        )
    return tokenizer, [f"rows for {', '.join(new)}, which the model never saw, were added"]

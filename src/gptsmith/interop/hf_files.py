"""Read the files of an untrusted model folder: JSON, and tensors in safetensors.

No pickle is opened and no file outside the folder is read. The safetensors library checks that a
header is well formed and matches its file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptsmith import files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_JSON_BYTES = 16 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open safetensors file; dtype as the format names it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Any  # safetensors.safe_open

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name, from model.safetensors or the shards of its index.

    Raises FileNotFoundError or ValueError, naming the file, for one that is missing, pickled,
    damaged, outside the folder, or does not hold what the index says.
    """
    if (folder / SINGLE).is_file():
        return _open(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has {pickles[0]} and no {SINGLE}: a pickle can run code and is not "
                "opened; if you trust it, load it with transformers and save it with "
                "save_pretrained"
            )
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    index = folder / INDEX
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f'{index}: expected {{"weight_map": {{tensor: file}}}}')
    entries: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(shards.values()):
        path = folder / shard
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names {shard!r}: expected a .safetensors file in its folder")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, {index.name} names it: download it again")
        found = _open(path)
        listed = {name for name, file in shards.items() if file == shard}
        for name in sorted(listed ^ found.keys()):
            raise ValueError(
                f"{path} {'lacks' if name in listed else 'has'} {name}, contrary to {index.name}: "
                "download both again"
            )
        entries |= found
    return entries


def _open(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. ValueError naming the file if it is not well formed."""
    check_link_target(path)
    with path.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if _MAX_JSON_BYTES < header < path.stat().st_size:
        raise ValueError(
            f"{path} has a header of {header:,} bytes, more than the {_MAX_JSON_BYTES:,} allowed"
        )
    try:
        file = files.open_safetensors(path, lambda: safe_open(path, "pt"))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error!s:.150}): download it again"
        ) from None
    entries = {}
    for name in file.keys():  # noqa: SIM118 (it is not iterable)
        if len(name) > 200 or not name.isprintable():  # it would appear in messages
            raise ValueError(f"{path} has a tensor with an invalid name, {name[:40]!r}")
        view = file.get_slice(name)
        entries[name] = StoredTensor(path, name, view.get_dtype(), tuple(view.get_shape()), file)
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError naming the file if it is damaged, too large or a link outside."""
    check_link_target(path)
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than the {_MAX_JSON_BYTES:,} allowed")
    return files.read_mapping(path)


def check_link_target(path: Path) -> None:
    """ValueError for a link out of the folder, except into `blobs` of the Hub's cache."""
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    cache = folder.parent.parent / "blobs"  # models--OWNER--NAME/{blobs,snapshots/COMMIT}
    if target.parent not in (folder, cache):
        raise ValueError(f"{path} is a link to {target}, outside its folder: copy the file here")


def widest_dtype(entries: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype that can represent all tensors. ValueError unless all are 16- or 32-bit floats."""
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{entry.path}: {name} is {entry.dtype}, expected {', '.join(DTYPES)}: "
                "save the model in one of these"
            )
    return reduce(torch.promote_types, (DTYPES[entry.dtype] for entry in entries.values()))

"""The safetensors files of a folder, from strangers: what they hold, and one tensor at a time.

Headers are checked before anything is read (https://github.com/huggingface/safetensors, "Format"),
and tensors are read, not mapped: memory holds one of them, and a file that shrinks meanwhile is an
error instead of a crash.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_LONGEST_HEADER = 4 << 20  # a hundred bytes for each tensor: 30 KB for a model of 1B
_LONGEST_JSON = 16 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: dtype as the format names it, and the place of its bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The tensor. ValueError if the file ends before it does."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        if self.size:
            with self.path.open("rb") as file:
                file.seek(self.start)
                if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != self.size:
                    raise ValueError(f"{self.path} is truncated: fetch it again")
        return tensor


def read_index(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder by name, from model.safetensors or the shards of its index.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing, pickled, damaged,
    outside the folder, or there twice.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has {pickles[0]} and no {SINGLE}: a pickle can run code and is not "
                "opened; load it with transformers where you trust it, and save_pretrained it"
            )
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    index = folder / INDEX
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f'{index}: expected {{"weight_map": {{tensor: file}}}}')
    entries: dict[str, Entry] = {}
    for shard in dict.fromkeys(shards.values()):
        path = folder / shard
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names {shard!r}: a shard is a .safetensors beside it")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, {index.name} names it: fetch it again")
        found = read_header(path)
        for name in found:
            if name in entries:
                raise ValueError(f"{name} is in {entries[name].path.name} and in {path}")
            if shards.get(name) != shard:
                raise ValueError(f"{path} has {name}, {index.name} says {shards.get(name)}")
        entries |= found
    if absent := shards.keys() - entries.keys():
        name = min(absent)
        raise ValueError(f"{folder / shards[name]} has no {name}, though {index.name} says so")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds. ValueError naming the file if it is not well formed."""
    refuse_links_out(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file: fetch it again")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{path} has a header of {length:,} bytes, no model needs so many")
        header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    for name in header:
        if len(name) > 200 or not name.isprintable():  # it would end up in somebody's terminal
            raise ValueError(f"{path} has a tensor of an impossible name, {name[:40]!r}")
    entries = {name: _entry(path, name, field, 8 + length) for name, field in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != at:
            how = "overlaps another tensor" if entry.start < at else "leaves a gap before it"
            raise ValueError(f"{path}: {name} {how}: the file is damaged or forged")
        at += entry.size
    if at != size:
        how = "is truncated" if at > size else "goes on behind its last tensor"
        raise ValueError(f"{path} {how}: {size:,} bytes, its header tells of {at:,}")
    return entries


def _entry(path: Path, name: str, field: Any, base: int) -> Entry:
    def integers(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)

    field = field if isinstance(field, dict) else {}
    dtype, shape, offsets = (field.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and integers(shape) and integers(offsets) and len(offsets) == 2):
        raise ValueError(f"{path}: {name} has no dtype, shape and data_offsets in the header")
    if dtype not in _BYTES:
        raise ValueError(f"{path}: {name} is {dtype[:20]}, not one of {', '.join(DTYPES)}")
    start, end = offsets
    if end - start != math.prod(shape) * _BYTES[dtype]:
        raise ValueError(f"{path}: {name} {dtype} {shape} has {end - start:,} bytes")
    return Entry(path, dtype, tuple(shape), base + start, end - start)


def read_json(path: Path, longest: int = _LONGEST_JSON) -> dict[str, Any]:
    """A JSON object from a file of a stranger. ValueError naming the file otherwise."""
    refuse_links_out(path)
    if (size := path.stat().st_size) > longest:
        raise ValueError(f"{path} has {size:,} bytes, more than {longest:,}: no model's file")
    return _parse(path.read_bytes(), path)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ValueError(f"{name!r} is there twice")
            fields[name] = value
        return fields

    try:
        content = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, something twice
        raise ValueError(f"{path}: not JSON as expected ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def refuse_links_out(path: Path) -> None:
    """The Hub's cache is made of links into its own `blobs`; no other link may leave the folder."""
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    cache = folder.parent.parent / "blobs"  # models--OWNER--NAME/snapshots/COMMIT beside blobs
    if target.parent not in (folder, cache):
        raise ValueError(f"{path} is a link to {target}, outside of its folder: copy the file here")


def widest(entries: Mapping[str, Entry]) -> torch.dtype:
    """The dtype that holds all of them. ValueError for one that is no float of 16 or 32 bits."""
    dtypes = set()
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{entry.path}: {name} is {entry.dtype}, and weights are {', '.join(DTYPES)} "
                "here: save the model in one of these"
            )
        dtypes.add(DTYPES[entry.dtype])
    return reduce(torch.promote_types, dtypes)

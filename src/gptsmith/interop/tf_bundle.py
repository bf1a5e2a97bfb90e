"""Read TensorFlow checkpoints ("tensor bundle", format V2) without TensorFlow.

NAME.index is a LevelDB table (github.com/google/leveldb, doc/table_format.md): blocks of keys with
shared prefixes, an index of the blocks, and a footer. Its values are protocol buffers
(tensorflow/core/protobuf/tensor_bundle.proto): under the key "" the number of data files, and under
each variable's name its type, shape, location in NAME.data-0000i-of-0000n, and checksum.
Files are not trusted: nothing is read or allocated beyond the sizes of the files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

_MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER = 48
_MAX_INDEX_BYTES = 1 << 20  # bytes; that of GPT-2 1558M has about 21,000
_MAX_NAME_BYTES = 256
# tensorflow/core/framework/types.proto
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}


@dataclass(frozen=True)
class Variable:
    """Where a variable is stored. dtype is None for one that is not a floating-point tensor."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int
    checksum: int


def read_index(prefix: Path) -> dict[str, Variable]:
    """The variables of the checkpoint PREFIX.index, PREFIX.data-*, by name.

    Raises ValueError or FileNotFoundError naming the file that is damaged or missing.
    """
    path = prefix.with_name(f"{prefix.name}.index")
    size = path.stat().st_size
    if size > _MAX_INDEX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, too many for the index of a GPT-2")
    try:
        table = dict(_table_items(path.read_bytes()))
        header, _ = _fields(table.pop(b"", b""))
        shards = header.get(1, 0)
        _require(shards <= len(table) + 1, f"{shards} data files")
        _require(not header.get(2), "big-endian numbers, which are not supported")
        files = [
            prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{shards:05d}") for i in range(shards)
        ]
        entries = [_entry(key.decode(), value, files) for key, value in table.items()]
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is not the index of a TensorFlow checkpoint (V2), or damaged: {error}"
        ) from None
    sizes = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, {path.name} needs it")
        sizes[file] = file.stat().st_size
    for entry in entries:
        if entry.offset + entry.size > sizes[entry.file]:
            raise ValueError(
                f"{entry.file} has {sizes[entry.file]:,} bytes, {entry.name} ends at "
                f"{entry.offset + entry.size:,}: the file is truncated, download it again"
            )
    return {entry.name: entry for entry in entries}


def read_tensor(entry: Variable) -> Tensor:
    """The variable, in its own type. ValueError if its checksum is wrong."""
    assert entry.dtype is not None
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    raw = tensor.view(-1).view(torch.uint8).numpy()
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        file.readinto(raw.data)  # a short read has another checksum
    if _masked_crc(raw) != entry.checksum:
        raise ValueError(
            f"{entry.file}: wrong checksum of {entry.name}, the file is damaged: download it again"
        )
    return tensor


def _entry(name: str, value: bytes, files: list[Path]) -> Variable:
    """A BundleEntryProto."""
    numbers, messages = _fields(value)
    _require(name.isprintable(), f"invalid name {name!r}")
    _require(7 not in messages, f"{name} is partitioned into slices, which are not supported")
    _, dims = _fields(messages.get(2, [b""])[-1])
    shape = tuple(_fields(dim)[0].get(1, 0) for dim in dims.get(2, []))
    dtype = _DTYPES.get(numbers.get(1, 0))
    shard, offset, size, checksum = (numbers.get(field, 0) for field in (3, 4, 5, 6))
    _require(shard < len(files), f"{name} in data file {shard} of {len(files)}")
    if dtype is not None:
        expected = math.prod(shape) * dtype.itemsize
        _require(size == expected, f"{name} of shape {shape} in {size:,} bytes")
    return Variable(name, dtype, shape, files[shard], offset, size, checksum)


def _table_items(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a whole table."""
    _require(data.endswith(_MAGIC), "the footer is not a table's")
    footer = data[-_FOOTER:]
    *_, at = _handle(footer, 0)  # of the block of filters
    offset, size, _ = _handle(footer, at)
    end = 0
    for _, value in _block(data, offset, size):
        offset, size, _ = _handle(value, 0)
        _require(offset >= end, f"the block at {offset} overlaps another")
        end = offset + size
        yield from _block(data, offset, size)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block: entries, restart points (not needed here), a trailer."""
    block = data[offset : offset + size]
    trailer = data[offset + size : offset + size + 5]  # type of compression, checksum
    _require(len(trailer) == 5, f"a block of {size} bytes at {offset}")
    _require(not trailer[0], "it is compressed, which TensorFlow never does to checkpoints")
    checksum = int.from_bytes(trailer[1:], "little")
    _require(_masked_crc(block + trailer[:1]) == checksum, f"checksum of the block at {offset}")
    end = len(block) - 4 * (int.from_bytes(block[-4:], "little") + 1)
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        _require(shared <= len(key) and at + rest + length <= end, f"an entry at {offset + at}")
        key = key[:shared] + block[at : at + rest]
        _require(len(key) <= _MAX_NAME_BYTES, f"a name of {len(key)} bytes")
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """A block handle: offset and size of a block, and the position after the handle."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _fields(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Numbers and messages of a protocol buffer (protobuf.dev, "Encoding"), by field number."""
    numbers: dict[int, int] = {}
    messages: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            numbers[field], at = _varint(data, at)
            continue
        length = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            length, at = _varint(data, at)
        _require(wire in (1, 2, 5) and at + length <= len(data), f"a field of {length} bytes")
        raw = data[at : at + length]
        at += length
        if wire == 2:
            messages.setdefault(field, []).append(raw)
        else:
            numbers[field] = int.from_bytes(raw, "little")
    return numbers, messages


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint (7 bits per byte, lowest first) and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes at {at}")


def _masked_crc(data: Any) -> int:  # bytes or an array of them
    """LevelDB's masked CRC-32C, for data that may itself contain checksums."""
    checksum = google_crc32c.value(data)
    rotated = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)

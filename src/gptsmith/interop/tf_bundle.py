"""TensorFlow's checkpoint files ("tensor bundle" of format V2), read without TensorFlow.

NAME.index is a sorted table as LevelDB writes it (github.com/google/leveldb, doc/table_format.md):
blocks of keys that share prefixes, an index of the blocks, a footer. Its values are small protocol
buffers (tensorflow/core/protobuf/tensor_bundle.proto): under "" how many data files there are, and
under each variable's name its type, shape, place in NAME.data-0000i-of-0000n, and checksum.
Files are not trusted: nothing is read or allocated beyond the sizes of the files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import torch
from torch import Tensor

_MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER = 48
_LARGEST_INDEX = 1 << 20  # bytes; that of GPT-2 1558M has about 21,000
_LONGEST_NAME = 256
# tensorflow/core/framework/types.proto
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}

Fields = dict[int, list[int | bytes]]


@dataclass(frozen=True)
class Entry:
    """Where a variable is stored. dtype is None for one that is not a floating-point tensor."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int
    checksum: int


def read_index(prefix: Path) -> dict[str, Entry]:
    """The variables of the checkpoint PREFIX.index, PREFIX.data-*, by name.

    Raises ValueError or FileNotFoundError naming the file that is damaged or missing.
    """
    path = prefix.with_name(f"{prefix.name}.index")
    size = path.stat().st_size
    if size > _LARGEST_INDEX:
        raise ValueError(f"{path} has {size:,} bytes, too many for the index of a GPT-2")
    try:
        table = dict(_table(path.read_bytes()))
        header = _fields(table.pop(b"", b""))
        shards = _integer(header, 1)
        _require(shards <= len(table) + 1, f"{shards} data files")
        if _integer(header, 2):
            raise ValueError("big-endian numbers, which are not supported")
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


def read_tensor(entry: Entry) -> Tensor:
    """The variable, in its own type. ValueError if its checksum is wrong."""
    assert entry.dtype is not None
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    raw = tensor.view(-1).view(torch.uint8).numpy()
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        done = 0
        while done < entry.size and (count := file.readinto(raw.data[done:])):
            done += count
    if done < entry.size or _mask(google_crc32c.value(raw)) != entry.checksum:
        raise ValueError(
            f"{entry.file}: wrong checksum of {entry.name}, the file is damaged: download it again"
        )
    return tensor


def _entry(name: str, value: bytes, files: list[Path]) -> Entry:
    """A BundleEntryProto."""
    fields = _fields(value)
    _require(name.isprintable(), f"invalid name {name!r}")
    if fields.get(7):
        raise ValueError(f"{name} is partitioned into slices, which are not supported")
    code, shard = _integer(fields, 1), _integer(fields, 3)
    dims = _fields(_bytes(fields, 2)).get(2, [])
    shape = tuple(_integer(_fields(dim), 1) for dim in dims if isinstance(dim, bytes))
    offset, size = _integer(fields, 4), _integer(fields, 5)
    dtype = _DTYPES.get(code)
    _require(shard < len(files), f"{name} in data file {shard} of {len(files)}")
    if dtype is not None:
        expected = math.prod(shape) * dtype.itemsize
        _require(size == expected, f"{name} of shape {shape} in {size:,} bytes")
    return Entry(name, dtype, shape, files[shard], offset, size, _integer(fields, 6))


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys, strictly increasing, and values of a whole table."""
    _require(len(data) >= _FOOTER and data.endswith(_MAGIC), "the footer is not a table's")
    footer = data[-_FOOTER:]
    _, at = _handle(footer, 0)  # of the block of filters
    blocks, _ = _handle(footer, at)
    last, end = None, 0
    for _, value in _block(data, *blocks):
        (offset, size), _ = _handle(value, 0)
        _require(offset >= end, f"the block at {offset} overlaps another")
        end = offset + size
        for key, content in _block(data, offset, size):
            _require(last is None or key > last, f"the key {key!r} is out of order")
            last = key
            yield key, content


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block: entries, restart points (not needed here), a trailer."""
    trailer = data[offset + size : offset + size + 5]  # type of compression, checksum
    _require(len(trailer) == 5, f"a block of {size} bytes at {offset}")
    if trailer[0]:
        raise ValueError("it is compressed, which TensorFlow never does to checkpoints")
    block = data[offset : offset + size]
    checksum = int.from_bytes(trailer[1:], "little")
    _require(
        _mask(google_crc32c.value(block + trailer[:1])) == checksum,
        f"checksum of the block at {offset}",
    )
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    _require(end >= 0, f"{restarts} restart points in {size} bytes")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        _require(shared <= len(key) and at + rest + length <= end, f"an entry at {offset + at}")
        key = key[:shared] + block[at : at + rest]
        _require(len(key) <= _LONGEST_NAME, f"a name of {len(key)} bytes")
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """(offset, size) of a block, and where what follows begins."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _fields(data: bytes) -> Fields:
    """The fields of a protocol buffer message by number (protobuf.dev, "Encoding")."""
    fields: Fields = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            fields.setdefault(tag >> 3, []).append(value)
            continue
        length = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            length, at = _varint(data, at)
        _require(wire in (1, 2, 5) and at + length <= len(data), f"a field of {length} bytes")
        raw = data[at : at + length]
        at += length
        content = raw if wire == 2 else int.from_bytes(raw, "little")
        fields.setdefault(tag >> 3, []).append(content)
    return fields


def _integer(fields: Fields, number: int) -> int:
    value = fields.get(number, [0])[-1]
    _require(isinstance(value, int), f"field {number} is not a number")
    assert isinstance(value, int)
    return value


def _bytes(fields: Fields, number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    _require(isinstance(value, bytes), f"field {number} is not a message")
    assert isinstance(value, bytes)
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits per byte, lowest first, and where what follows begins."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes at {at}")


def _mask(checksum: int) -> int:
    """The form in which LevelDB stores a checksum of data that may contain checksums."""
    rotated = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)

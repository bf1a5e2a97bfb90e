"""Safetensors files of strangers: broken and forged ones are refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptsmith.interop.weight_files import read_index, widest

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"model.layers.{i}.up.weight": torch.rand(4, 8) for i in range(3)}
    save_file({**tensors, NORM: torch.rand(32)}, folder / "model.safetensors")
    return folder


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file, its data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + length])
    changed = change(fields)
    text = changed if isinstance(changed, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def set_field(name: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields[name].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field(NORM, data_offsets=[0, 128]), "overlaps another tensor"),
        (set_field(NORM, data_offsets=[1 << 30, (1 << 30) + 128]), "leaves a gap"),
        (set_field(NORM, data_offsets=[-128, 0]), "no dtype, shape and data_offsets"),
        (set_field(NORM, shape=[1 << 40, 1 << 40]), "has 128 bytes"),
        (set_field(NORM, shape=[31]), "F32 .31. has 128 bytes"),
        (set_field(NORM, shape="x"), "no dtype, shape and data_offsets"),
        (set_field(NORM, dtype="F8_X"), "is F8_X, not one of"),
        (set_field(NORM, dtype="I32"), "is I32, and weights are"),
        (lambda fields: b"{" * 100_000, "not JSON|nested too deeply"),
        (lambda fields: b'{"\\u001b[2J": {}}', "a tensor of an impossible name"),
        (lambda fields: b'{"a":{},"a":{}}', "'a' is there twice"),
        (lambda fields: b"[" * 100_000, "nested too deeply"),
        (lambda fields: b"\xff\xfe{}", "not JSON"),
    ],
)
def test_forged_headers_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    header(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        widest(read_index(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 400


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for content, message in [
        (data[:-100], "is truncated: .* bytes, its header tells of"),
        (data + b"x", "goes on behind its last tensor"),
        (data[:100], "is truncated"),
        (b"", "is truncated"),
        (struct.pack("<Q", 1 << 60) + data[8:], "is truncated or no safetensors"),
        (b"\x80\x04pickle of something", "is truncated or no safetensors"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_index(folder)
    with path.open("wb") as file:  # a hole of 64 MiB that says it is a header
        file.write(struct.pack("<Q", 64 << 20))
        file.truncate((64 << 20) + 8)
    with pytest.raises(ValueError, match="has a header of 67,108,864 bytes"):
        read_index(folder)
    path.write_bytes(data)
    entries = read_index(folder)
    path.write_bytes(data[:-100])  # cut off while it is read
    with pytest.raises(ValueError, match="is truncated"):
        [entry.read() for entry in entries.values()]


def shards(folder: Path, names: dict[str, str], files: dict[str, dict[str, Tensor]]) -> Path:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    return folder


def test_shards_stay_in_their_folder(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    shards(folder, {}, {})
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "a/x.safetensors",
                 "..\\x.safetensors", "..", "", "x.bin"):  # fmt: skip
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        with pytest.raises(ValueError, match=r"a shard is a \.safetensors beside it"):
            read_index(folder)
    (folder / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "x.safetensors")}))
    with pytest.raises(ValueError, match=r"is a link to .* outside of its folder"):
        read_index(folder)
    for broken in ('{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", "[]", '{"a":1,"a":2}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"index\.json: "):
            read_index(folder)


def test_the_cache_of_the_hub_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "m" / "snapshots" / "abc", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert len(read_index(snapshot)) == 4


def test_shards_must_be_what_the_index_says(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    half = {name: "a.safetensors" if i < 2 else "b.safetensors" for i, name in enumerate(names)}
    a, b = ({n: tensors[n] for n in names if half[n][0] == side} for side in "ab")
    shards(folder, half, {"a.safetensors": a})
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        read_index(folder)
    save_file({**b, names[0]: a[names[0]]}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"is in a\.safetensors and in .*b\.safetensors"):
        read_index(folder)
    save_file({n: b[n] for n in list(b)[1:]}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors has no model"):
        read_index(folder)
    save_file(b, folder / "b.safetensors")
    assert len(read_index(folder)) == 4


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: neither model\.safetensors"):
        read_index(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin .* is not opened; .*save_pretrained"):
        read_index(folder)

"""Files of a model folder from elsewhere: damaged and forged ones are rejected."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptsmith.interop.hf_files import read_index, widest_dtype

NORM = "model.norm.weight"
DAMAGED = "is damaged or not a safetensors file"


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
        (set_field(NORM, data_offsets=[0, 128]), DAMAGED),
        (set_field(NORM, data_offsets=[1 << 30, (1 << 30) + 128]), DAMAGED),
        (set_field(NORM, data_offsets=[-128, 0]), DAMAGED),
        (set_field(NORM, shape=[1 << 40, 1 << 40]), DAMAGED),
        (set_field(NORM, shape=[31]), DAMAGED),
        (set_field(NORM, shape="x"), DAMAGED),
        (set_field(NORM, dtype="F8_X"), DAMAGED),
        (set_field(NORM, dtype="I32"), "is I32, expected F32"),
        (lambda fields: fields.update({"\x1b[2J": fields.pop(NORM)}), "an invalid name"),
        (lambda fields: b"[" * 100_000, DAMAGED),
        (lambda fields: b"\xff\xfe{}", DAMAGED),
    ],
)
def test_forged_headers_are_rejected(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    header(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        widest_dtype(read_index(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 400


def test_damaged_files_are_rejected(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for content in (
        data[:-100],
        data + b"x",
        data[:100],
        b"",
        struct.pack("<Q", 1 << 60) + data[8:],
        b"\x80\x04pickle of something",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=DAMAGED):
            read_index(folder)


def test_headers_of_many_megabytes_are_not_parsed(folder: Path) -> None:
    header = b"{" + b" " * (17 << 20) + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(ValueError, match="header of 17,825,794 bytes, more than"):
        read_index(folder)


def shards(folder: Path, names: dict[str, str], files: dict[str, dict[str, Tensor]]) -> Path:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    return folder


def test_shards_outside_the_folder_are_rejected(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    shards(folder, {}, {})
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "a/x.safetensors",
                 "..\\x.safetensors", "..", "", "x.bin"):  # fmt: skip
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        with pytest.raises(ValueError, match=r"expected a \.safetensors file in its folder"):
            read_index(folder)
    (folder / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "x.safetensors")}))
    with pytest.raises(ValueError, match=r"is a link to .* outside its folder"):
        read_index(folder)
    for broken in ('{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", "[]"):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"index\.json: "):
            read_index(folder)


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "m" / "snapshots" / "abc", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert len(read_index(snapshot)) == 4


def test_shards_must_match_the_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    half = {name: "a.safetensors" if i < 2 else "b.safetensors" for i, name in enumerate(names)}
    a, b = ({n: tensors[n] for n in names if half[n][0] == side} for side in "ab")
    shards(folder, half, {"a.safetensors": a})
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        read_index(folder)
    save_file({**b, names[0]: a[names[0]]}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors has .*, contrary to"):
        read_index(folder)
    save_file({n: b[n] for n in list(b)[1:]}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors lacks model"):
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

"""OpenAI's checkpoints: one of real TensorFlow (fixtures/tf_gpt2), others written here by the
documented form of the files, and all the ways in which they can be broken."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from random_weights import add_noise
from runs import imported_model
from torch import Tensor

from gptsmith.interop import openai_tf

FIXTURE = Path(__file__).parent / "fixtures" / "tf_gpt2"
V, T, C, H, L = 300, 16, 8, 2, 2  # the fixture's sizes


# --- a writer of the format ----------------------------------------------------------------------


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def message(*fields: tuple[int, int | bytes | float]) -> bytes:
    """A protocol buffer; a float stands for fixed32."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<I", int(value))
        else:
            out += varint(number << 3) + varint(value)
    return out


def masked(data: bytes) -> int:
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(entries: list[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    """Prefix-compressed, with a restart every fourth entry, and the trailer."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % 4 == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    out += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    out += bytes([compression])
    return out + struct.pack("<I", masked(out))


def table(entries: list[tuple[bytes, bytes]], per_block: int = 7, compression: int = 0) -> bytes:
    out, index = b"", []
    for at in range(0, len(entries), per_block):
        part = entries[at : at + per_block]
        written = block(part, compression)
        index.append((part[-1][0], varint(len(out)) + varint(len(written) - 5)))
        out += written
    meta, blocks = block([]), block(index)
    handles = varint(len(out)) + varint(len(meta) - 5)
    handles += varint(len(out) + len(meta)) + varint(len(blocks) - 5)
    return out + meta + blocks + handles.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def entry(array: np.ndarray, shard: int, offset: int, changes: Mapping[str, Any]) -> bytes:
    shape = b"".join(message((2, message((1, size)))) for size in array.shape)
    data = array.tobytes()
    fields: dict[str, Any] = dict(
        dtype=(1, 1), shape=(2, shape), shard=(3, shard), offset=(4, offset), size=(5, len(data)),
        checksum=(6, float(masked(data))),
    )  # fmt: skip
    return message(*{**fields, **changes}.values())


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    sizes: dict[str, Any],
    *,
    shards: int = 1,
    changes: Mapping[str, dict[str, Any]] | None = None,
    header: tuple[tuple[int, int], ...] = (),
    compression: int = 0,
) -> Path:
    """A checkpoint of `tensors` in `folder`, dealt out to data files in turn."""
    data = [b""] * shards
    entries = [(b"", message((1, shards), *header))]
    for i, name in enumerate(sorted(tensors)):
        array = np.ascontiguousarray(tensors[name])
        changed = (changes or {}).get(name, {})
        value = entry(array, i % shards, len(data[i % shards]), changed)
        entries.append((name.encode(), value))
        data[i % shards] += array.tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-7.index").write_bytes(table(entries, compression=compression))
    for i, part in enumerate(data):
        (folder / f"model-7.data-{i:05d}-of-{shards:05d}").write_bytes(part)
    (folder / "hparams.json").write_text(json.dumps(sizes))
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(FIXTURE / name, folder)
    return folder


SIZES = {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H, "n_layer": L}


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_head=H, n_layer=L)
    model = GPT2LMHeadModel(config).eval()
    add_noise(model, 0.3)
    return model


@pytest.fixture(scope="module")
def tensors(reference: Any) -> dict[str, np.ndarray]:
    """The reference's weights under OpenAI's names and in their shapes."""
    found = {}
    for name, tensor in reference.transformer.state_dict().items():
        array = tensor.numpy()
        parts = name.removeprefix("h.").split(".")
        if name.startswith("h."):
            parts = [f"h{parts[0]}", *parts[1:]]
        if parts[0] in ("wte", "wpe"):
            parts.pop()
        elif "ln" in parts[-2]:
            parts[-1] = {"weight": "g", "bias": "b"}[parts[-1]]
        else:
            array = array[None] if parts[-1] == "weight" else array
            parts[-1] = parts[-1][0]
        found["/".join(["model", *parts])] = array
    return found


# --- what is read --------------------------------------------------------------------------------


def test_checkpoint_written_by_tensorflow() -> None:
    """Three data files, an optimizer's variables between; expected logits by NumPy (make.py)."""
    imported = openai_tf.open_folder(FIXTURE)
    expected = json.loads((FIXTURE / "logits.json").read_text())
    with torch.no_grad():
        logits = imported_model(imported)(torch.tensor([expected["ids"]]))[0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-4, rtol=0)
    assert imported.dtype == torch.float32
    assert imported.config.context_length == T
    assert imported.config.n_head == H
    assert imported.tokenizer.vocab_size == V
    text = "The smith strikes again."
    assert imported.tokenizer.decode(imported.tokenizer.encode(text)) == text


@pytest.mark.parametrize("shards", [1, 3])
def test_logits_equal_transformers(
    tmp_path: Path, reference: Any, tensors: dict[str, np.ndarray], shards: int
) -> None:
    model = imported_model(openai_tf.open_folder(write(tmp_path, tensors, SIZES, shards=shards)))
    ids = torch.randint(0, V, (2, T))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


def test_half_precision_is_kept(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    changes = {name: {"dtype": (1, 19)} for name in half}
    imported = openai_tf.open_folder(write(tmp_path, half, SIZES, changes=changes))
    assert imported.dtype == torch.float16
    assert {tensor.dtype for _, tensor in imported.tensors()} == {torch.float16}


def test_newest_checkpoint_is_chosen(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    write(tmp_path, tensors, SIZES)
    assert openai_tf.open_folder(tmp_path).origin["checkpoint"] == "model-7"
    shutil.copy(tmp_path / "model-7.index", tmp_path / "model-8.index")
    with pytest.raises(ValueError, match="has 2 checkpoints"):
        openai_tf.open_folder(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/home/ada/run1/model-7"\n')
    assert openai_tf.open_folder(tmp_path).origin["checkpoint"] == "model-7"
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "../../elsewhere"\n')
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.index: missing"):
        openai_tf.open_folder(tmp_path)


def test_tensors_are_read_lazily(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    write(tmp_path, tensors, SIZES)
    data = tmp_path / "model-7.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1  # of model/wte, the last by name and the first that is read
    data.write_bytes(content)
    imported = openai_tf.open_folder(tmp_path)
    reading = imported.tensors()
    with pytest.raises(ValueError, match="wrong checksum of model/wte"):
        next(reading)


# --- what is rejected -----------------------------------------------------------------------------

Change = Callable[[dict[str, np.ndarray]], dict[str, Any]]
W = "model/h0/mlp/c_fc/w"
HUGE = 1 << 62

REJECTED: dict[str, tuple[Change, str]] = {
    "a variable is missing": (lambda t: {"tensors": {n: t[n] for n in t if n != W}}, W),
    "a variable of another shape": (
        lambda t: {"tensors": {**t, "model/ln_f/g": np.ones(C + 1, np.float32)}},
        r"model/ln_f/g has shape \(9,\), expected \(8,\)",
    ),
    "a layer that hparams.json does not count": (
        lambda t: {"sizes": {**SIZES, "n_layer": 1}},
        "model/h1/.* is unexpected",
    ),
    "a variable of integers": (
        lambda t: {"changes": {W: {"dtype": (1, 3)}}},
        "does not consist of floating",
    ),
    "a variable in slices": (
        lambda t: {"changes": {W: {"slices": (7, message((1, 1)))}}},
        "partitioned into slices",
    ),
    "a shape that its bytes do not fill": (
        lambda t: {
            "changes": {W: {"size": (5, HUGE), "shape": (2, message((2, message((1, HUGE)))))}}
        },
        "in 4,611,686",
    ),
    "bytes behind the end": (lambda t: {"changes": {W: {"offset": (4, HUGE)}}}, "is truncated"),
    "a data file that is not there": (
        lambda t: {"changes": {W: {"shard": (3, 9)}}},
        "in data file 9 of 1",
    ),
    "more data files than variables": (lambda t: {"header": ((1, HUGE),)}, "data files"),
    "big-endian numbers": (lambda t: {"header": ((2, 1),)}, "big-endian"),
    "compression": (lambda t: {"compression": 1}, "compressed"),
    "a field that should be a message": (
        lambda t: {"changes": {W: {"shape": (2, 5)}}},
        r"of shape \(\) in",
    ),
    "a tokenizer of another model": (
        lambda t: {
            "tensors": {**t, "model/wte": np.ones((200, C), np.float32)},
            "sizes": {**SIZES, "n_vocab": 200},
        },
        "do not belong together",
    ),
    "n_layer beyond all bounds": (lambda t: {"sizes": {**SIZES, "n_layer": HUGE}}, "n_layer is"),
    "n_vocab beyond all bounds": (
        lambda t: {"sizes": {**SIZES, "n_vocab": HUGE}},
        "impossible sizes",
    ),
    "n_head that does not divide": (lambda t: {"sizes": {**SIZES, "n_head": 3}}, "multiple of"),
    "sizes that are no numbers": (lambda t: {"sizes": {**SIZES, "n_ctx": "x"}}, "n_ctx is 'x'"),
    "no sizes": (lambda t: {"sizes": []}, "a mapping of names"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_is_rejected(tmp_path: Path, tensors: dict[str, np.ndarray], name: str) -> None:
    change, words = REJECTED[name]
    arguments: dict[str, Any] = {"tensors": tensors, "sizes": SIZES, **change(tensors)}
    write(tmp_path, **arguments)
    with pytest.raises(ValueError, match=words) as error:
        dict(openai_tf.open_folder(tmp_path).tensors())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_damaged_files_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    shutil.copytree(FIXTURE, folder)
    index, data = folder / "model.ckpt.index", folder / "model.ckpt.data-00001-of-00003"
    good = index.read_bytes()
    for broken, words in (
        (good[:-1], "footer"),
        (good[:-60] + good[-48:], "block"),
        (bytes(len(good)), "footer"),
        (good[:40] + bytes([good[40] ^ 4]) + good[41:], "checksum of the block"),
        (good + bytes(1 << 20), "too many"),
        (b"", "footer"),
    ):
        index.write_bytes(broken)
        with pytest.raises(ValueError, match=words):
            openai_tf.open_folder(folder)
    index.write_bytes(good)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated, download it again"):
        openai_tf.open_folder(folder)
    data.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        openai_tf.open_folder(folder)


def test_bad_content_under_good_checksums_is_rejected(tmp_path: Path) -> None:
    prefix = tmp_path / "m"
    index = tmp_path / "m.index"
    header = (b"", message((1, 0)))
    for entries, words in (
        ([header, (b"x" * 300, b"")], "a name of 300 bytes"),
        ([header, (b"\xff", b"")], "utf-8"),
        ([(b"", b"\x08" + b"\x80" * 11)], "more than ten bytes"),
        ([(b"", b"\x0a\x7f")], "a field of 127 bytes"),
        ([(b"", b"\x0b")], "a field of 0 bytes"),
    ):
        index.write_bytes(table(entries))
        with pytest.raises(ValueError, match=words):
            openai_tf.tf_bundle.read_index(prefix)


def test_random_damage_is_rejected_or_harmless(tmp_path: Path) -> None:
    """Values changed at random under good checksums: an error of ours, never another."""
    prefix = tmp_path / "model.ckpt"
    for i in range(3):
        shutil.copy(FIXTURE / f"model.ckpt.data-0000{i}-of-00003", tmp_path)
    original = list(openai_tf.tf_bundle._table_items((FIXTURE / "model.ckpt.index").read_bytes()))
    random = np.random.default_rng(0)
    rejected = 0
    for _ in range(100):
        entries = [(key, bytearray(value)) for key, value in original]
        for _ in range(3):
            value = entries[random.integers(len(entries))][1]
            if value:
                value[random.integers(len(value))] = random.integers(256)
        Path(f"{prefix}.index").write_bytes(table([(k, bytes(v)) for k, v in entries]))
        try:
            found = openai_tf.tf_bundle.read_index(prefix)
        except (ValueError, FileNotFoundError):
            rejected += 1
            continue
        for one in found.values():
            if one.dtype is not None:
                try:
                    assert isinstance(openai_tf.tf_bundle.read_tensor(one), Tensor)
                except ValueError:
                    rejected += 1
    assert rejected > 50

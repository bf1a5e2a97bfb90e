"""Shards on disk: what is written is read back, what is damaged is named."""

import json
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from gptsmith import files
from gptsmith.data import shards
from gptsmith.data.dataset import Windows, validation_batches
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Corpus, ShardWriter, fingerprint
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import next_token_loss


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    config = PrepareConfig(
        sources=(str(text),), out=tmp_path / "corpus", tokenizer="byte", shard_tokens=500
    )
    return prepare(config)


def test_corpus_is_read_back(corpus: Path) -> None:
    opened = Corpus.open(corpus)
    text = (corpus.parent / "text.txt").read_bytes()
    assert [len(shard) for shard in opened.train] == [500, 500, 500, 481]
    assert isinstance(opened.train[0], np.memmap)
    train = np.concatenate(opened.train)
    assert train[0] == opened.tokenizer.eos_id == 256
    assert train[1:].astype(np.uint8).tobytes() == text[:1980]
    assert np.concatenate(opened.val).astype(np.uint8).tobytes() == text[1980:]
    assert (opened.train_tokens, opened.val_tokens) == (1981, 220)
    assert opened.manifest["splits"]["val"]["bytes"] == 220
    assert opened.fingerprint == fingerprint(opened.manifest)
    opened.verify()


def test_shards_of_unequal_length_are_read_and_trained_on(corpus: Path) -> None:
    """As when the parts of a corpus were made on different machines."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    tokens = np.concatenate(Corpus.open(corpus).train)
    shards = []
    for number, part in enumerate(np.split(tokens, [700, 710, 1500])):
        path = corpus / f"train-part-{number}.npy"
        np.save(path, part)
        shards.append({"file": path.name, "tokens": len(part), "sha256": files.sha256(path)})
    manifest["splits"]["train"]["shards"] = shards
    manifest["fingerprint"] = fingerprint(manifest)
    del manifest["digest"]
    files.write_json(corpus / "manifest.json", manifest)
    opened = Corpus.open(corpus)
    opened.verify()
    assert [len(shard) for shard in opened.train] == [700, 10, 790, 481]
    assert (np.concatenate(opened.train) == tokens).all()
    windows = Windows(opened.train, T=32)
    assert windows.per_epoch == 699 // 32 + 0 + 789 // 32 + 480 // 32
    batch = windows.batch(0, windows.per_epoch)
    assert batch.count == 32 * windows.per_epoch
    config = ModelConfig(
        vocab_size=257, context_length=32, n_layer=1, n_head=1, n_embd=8, dropout=0.0
    )
    loss = next_token_loss(GPTModel(config), batch) / batch.count
    assert loss.item() == pytest.approx(np.log(257), rel=0.1)


def test_missing_corpus_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gptsmith prepare SOURCE --out .*nowhere"):
        Corpus.open(tmp_path / "nowhere")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "progress.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        Corpus.open(tmp_path)


def test_missing_shard_is_named(corpus: Path) -> None:
    (corpus / "train-00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.npy: this shard is missing"):
        Corpus.open(corpus)


def test_truncated_shard_is_named(corpus: Path) -> None:
    path = corpus / "train-00002.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train-00002\.npy: 1118 bytes instead of 1128"):
        Corpus.open(corpus)


@pytest.mark.parametrize("header", [b"{'descr': '<u2', 'shape': (", b"\\\0((((", b"{'descr': "])
def test_shard_with_a_header_that_is_not_python_is_named(corpus: Path, header: bytes) -> None:
    path = corpus / "val-00000.npy"
    data = path.read_bytes()
    path.write_bytes(data[:10] + header.ljust(118) + data[128:])
    with pytest.raises(ValueError, match=r"val-00000\.npy: not a readable \.npy file"):
        Corpus.open(corpus)


def test_shard_with_a_damaged_header_is_named(corpus: Path) -> None:
    path = corpus / "val-00000.npy"
    path.write_bytes(b"rubbish" + path.read_bytes()[7:])
    with pytest.raises(ValueError, match=r"val-00000\.npy: not a readable \.npy file"):
        Corpus.open(corpus)


def test_shard_of_another_dtype_is_named(corpus: Path) -> None:
    path = corpus / "val-00000.npy"
    data = path.read_bytes()
    path.write_bytes(data[:128].replace(b"<u2", b"<i2") + data[128:])
    with pytest.raises(ValueError, match=r"holds int16 \(220,\), the manifest says uint16"):
        Corpus.open(corpus)


def test_verify_finds_a_changed_token(corpus: Path) -> None:
    path = corpus / "train-00001.npy"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00001\.npy: damaged \(its sha256"):
        Corpus.open(corpus).verify()


def test_tokenizer_of_another_corpus_is_rejected(corpus: Path, tmp_path: Path) -> None:
    from gptsmith.tokenizer import Tokenizer

    Tokenizer.char(["abc"]).save(corpus)
    with pytest.raises(ValueError, match="not the tokenizer that made this corpus"):
        _ = Corpus.open(corpus).tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this gptsmith reads format 1: install a newer gptsmith, or"),
        (
            {"format": 0},
            "format 0, which is not a version number: damaged or edited; prepare the corpus",
        ),
        ({"format": True}, "format True, which is not a version number"),
        ({"dtype": None}, "instead of|not a corpus manifest"),
        ({"splits": {}}, "not a corpus manifest"),
        ({"splits": []}, "not a corpus manifest"),
        ({"splits": {"train": {"tokens": 1, "shards": []}}}, "not a corpus manifest"),
        ({"tokenizer": "byte"}, "not a corpus manifest"),
        ({"fingerprint": "0"}, "inconsistent"),
    ],
)
def test_edited_manifest_is_rejected(corpus: Path, change: dict, message: str) -> None:
    path = corpus / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Corpus.open(corpus)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"format": 1}'])
def test_manifest_of_another_kind_is_rejected_and_kept(
    corpus: Path, content: str, tmp_path: Path
) -> None:
    path = corpus / "manifest.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a corpus manifest") as error:
        Corpus.open(corpus)
    assert "Error" not in str(error.value)
    if content == "{}":
        assert "(it lacks 'format')" in str(error.value)
    for overwrite in (False, True):  # it may be anything's
        with pytest.raises(
            FileExistsError, match=r"manifest\.json: not part of a corpus, or damaged; choose"
        ):
            prepare(
                PrepareConfig(
                    sources=(str(tmp_path / "text.txt"),),
                    out=corpus,
                    tokenizer="byte",
                    overwrite=overwrite,
                )
            )
    assert path.read_text() == content


def test_number_of_shards_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARDS", 3)
    writer = ShardWriter(tmp_path, "train", np.dtype(np.uint16), 2)
    with pytest.raises(ValueError, match="more than 3 shards of 2 tokens: give a larger --shard"):
        writer.append(np.arange(8), documents=1, text_bytes=8)
    writer.close()


def test_truncated_manifest_is_named_with_its_line(corpus: Path) -> None:
    path = corpus / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"manifest\.json, line \d+"):
        Corpus.open(corpus)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_writer_resumes_at_any_recorded_state(tmp_path: Path, dtype: type) -> None:
    """At every prefix of what was journaled, whatever was written behind it."""
    ids = np.arange(70_000 if dtype is np.uint32 else 60_000, dtype=dtype)[-1000:]
    kind = np.dtype(dtype)

    def add(writer: ShardWriter, start: int, stop: int) -> None:
        writer.append(ids[start:stop], documents=1, text_bytes=stop - start)

    for journaled in (0, 1, 299, 300, 301, 600, 650):
        folder = tmp_path / f"{journaled}"
        folder.mkdir()
        writer = ShardWriter(folder, "train", kind, 300)
        add(writer, 0, journaled)
        writer.sync()
        record = json.loads(json.dumps(writer.record))
        add(writer, journaled, 950)  # finishes further shards, then the process dies
        writer.close()
        writer = ShardWriter(folder, "train", kind, 300, record)
        add(writer, journaled, 1000)
        writer.finish()
        assert sorted(p.name for p in folder.iterdir()) == [f"train-0000{i}.npy" for i in range(4)]
        arrays = [np.load(folder / shard["file"]) for shard in writer.record["shards"]]
        assert [len(array) for array in arrays] == [300, 300, 300, 100]
        assert (np.concatenate(arrays) == ids).all()
        assert writer.record["tokens"] == writer.record["bytes"] == 1000


def test_writer_rejects_a_shard_that_lost_data(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", np.dtype(np.uint16), 300)
    writer.append(np.zeros(100), documents=1, text_bytes=100)
    writer.close()
    path = tmp_path / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="200 bytes, 328 were written before"):
        ShardWriter(tmp_path, "train", np.dtype(np.uint16), 300, writer.record)


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize(("split", "at"), [("train", 300), ("val", -1), ("train", 120)])
def test_a_damaged_shard_is_named_when_it_is_first_used(corpus: Path, split: str, at: int) -> None:
    """A token, the last byte, a blank of the header that becomes a null."""
    flip(corpus / f"{split}-00000.npy", at, 32 if at == 120 else 1)
    with pytest.raises(ValueError, match=rf"{split}-00000\.npy: (damaged \(its sha256|not a read)"):
        _ = getattr(Corpus.open(corpus), split)[0]
    if at == 120:  # found when the corpus is opened
        return
    opened = Corpus.open(corpus)
    assert len(opened.train[1]) == 500  # the others are intact
    windows = Windows(opened.train, T=16)
    assert windows.per_epoch == 3 * 31 + 30  # known without reading a shard
    with pytest.raises(ValueError, match=rf"{split}-00000\.npy: damaged"):
        _ = windows.batch(0, windows.per_epoch), [*validation_batches(opened.val, 16, 4, None)]


def test_ids_beyond_the_vocabulary_are_named_with_their_shard(corpus: Path) -> None:
    path, manifest = corpus / "train-00002.npy", json.loads((corpus / "manifest.json").read_text())
    tokens = np.load(path)
    tokens[3] = 257
    np.save(path, tokens)
    manifest["splits"]["train"]["shards"][2]["sha256"] = files.sha256(path)
    manifest["fingerprint"] = fingerprint(manifest)
    del manifest["digest"]
    files.write_json(corpus / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"train-00002\.npy: holds token id 257, .* ends at 256"):
        Corpus.open(corpus).verify()


def test_verification_in_the_background_stops_the_use_of_any_shard(corpus: Path) -> None:
    flip(corpus / "train-00003.npy", 200)
    shards = Corpus.open(corpus).train
    assert len(shards[0]) == 500
    shards.verify_in_background()
    for thread in threading.enumerate():
        if thread.name == "verify shards":
            thread.join()
    with pytest.raises(ValueError, match=r"train-00003\.npy: damaged"):
        _ = shards[0]


def test_any_changed_bit_of_the_manifest_is_found_or_means_the_same(corpus: Path) -> None:
    path = corpus / "manifest.json"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    meaning, found = json.loads(good), []
    for at in rng.integers(len(good), size=300).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1 :])
        with suppress(ValueError, FileNotFoundError):
            opened = Corpus.open(corpus)
            opened.verify()
            if "digest" in opened.manifest:  # the key may have changed
                assert opened.manifest == meaning
            found.append(opened.manifest["fingerprint"] == meaning["fingerprint"])
    assert all(found)


def test_a_corpus_without_digest_of_its_manifest_opens(corpus: Path) -> None:
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]  # as earlier versions wrote it
    files.write_json(path, manifest)
    Corpus.open(corpus).verify()
    manifest["splits"]["val"]["bytes"] += 1
    manifest["digest"] = "0"
    files.write_json(path, manifest)
    with pytest.raises(ValueError, match="inconsistent"):
        Corpus.open(corpus)

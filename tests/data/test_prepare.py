"""From text to shards: nothing lost, nothing double, a fixed validation split, safe to kill."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gptsmith import files
from gptsmith.data import corpus_writer, encode, text_files
from gptsmith.data.corpus_writer import CorpusWriter
from gptsmith.data.encode import EncodedPart
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Corpus
from gptsmith.tokenizer import Tokenizer


def run(out: Path, *sources: str | Path, **options: object) -> Corpus:
    """A prepared corpus; characters as bytes unless told otherwise."""
    config = {"tokenizer": "byte", **options}
    return Corpus.open(
        prepare(PrepareConfig(sources=tuple(map(str, sources)), out=out, **config))  # type: ignore[arg-type]
    )


def decoded(corpus: Corpus, split: str) -> list[str]:
    """The documents of a split, the first of which may have begun elsewhere."""
    ids = np.concatenate(getattr(corpus, split))
    return corpus.tokenizer.decode(ids).split("<|endoftext|>")


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- splits --------------------------------------------------------------------------------------


def test_one_document_validates_on_its_last_tenth(tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abcdé \n", k=1003))
    (tmp_path / "a.txt").write_text(text)
    corpus = run(tmp_path / "out", tmp_path / "a.txt", tokenizer="char")
    assert decoded(corpus, "train") == ["", text[:902]]
    assert decoded(corpus, "val") == [text[902:]]
    assert corpus.manifest["validation"] == "the last 0.1 of one document's characters"
    assert corpus.manifest["splits"]["train"]["documents"] == 1
    assert corpus.manifest["splits"]["train"]["bytes"] == len(text[:902].encode())
    assert corpus.manifest["splits"]["val"]["bytes"] == len(text[902:].encode())


def test_tiny_shakespeare(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))
    corpus = run(tmp_path / "out", "shakespeare", tokenizer="char")
    text = (real_data / "tinyshakespeare" / "input.txt").read_text()
    assert (corpus.train_tokens, corpus.val_tokens) == (1 + 89_991, 10_000)
    assert corpus.tokenizer.vocab_size == 61 + 1
    assert decoded(corpus, "val") == [text[89_991:]]


def test_wikitext_2_validates_on_its_own_split(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))
    corpus = run(tmp_path / "out", "wikipedia|wikitext-2", tokenizer="gpt2", workers=2)
    (source,) = corpus.manifest["sources"]
    assert (source["asked"], source["used"]) == ("wikipedia|wikitext-2", "wikitext-2")
    assert "wikimedia/wikipedia: not to be had from the Hub" in source["passed"][0]
    text = (real_data / "wikitext-2" / "valid.txt").read_text()
    assert "".join(decoded(corpus, "val")) == text
    # one encoder for the whole file knows nothing of frames, pieces and threads
    val = np.concatenate(corpus.val)
    articles = np.split(val, np.flatnonzero(val == corpus.tokenizer.eos_id))[1:]
    assert len(articles) == corpus.manifest["splits"]["val"]["documents"] == 2
    for ids in articles:
        assert corpus.tokenizer.encode(corpus.tokenizer.decode(ids[1:])) == ids[1:].tolist()


def test_a_novel_in_pieces_has_the_ids_of_the_whole(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    path = real_data / "english_novels" / "Doyle_Hound_1902.txt"
    tokenizer = Tokenizer.gpt2(real_data / "gpt2_bpe")
    tokenizer.save(tmp_path / "tokenizer.json")
    corpus = run(tmp_path / "out", path, tokenizer=str(tmp_path / "tokenizer.json"))
    text = path.read_bytes().decode("utf-8-sig")
    cut = int(len(text) * 0.9)
    whole = [tokenizer.eos_id, *tokenizer.encode(text[:cut])]
    assert np.concatenate(corpus.train).tolist() == whole
    assert np.concatenate(corpus.val).tolist() == tokenizer.encode(text[cut:])


@pytest.mark.parametrize("count", [2, 9, 99, 100, 300])
def test_several_documents_are_divided_by_hash(tmp_path: Path, count: int) -> None:
    texts = [f"document {i}" for i in range(count)]
    corpus = run(tmp_path / "a", lines(tmp_path / "a.jsonl", texts))
    train, val = decoded(corpus, "train")[1:], decoded(corpus, "val")[1:]
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in their order
    assert 0 < len(val) <= max(1, 0.2 * count)
    if count < 100:
        assert len(val) == max(1, round(count / 10))
    other = run(tmp_path / "b", lines(tmp_path / "b.jsonl", texts[::-1]))
    assert set(decoded(other, "val")) == set(decoded(corpus, "val"))


def test_validation_from_a_file(tmp_path: Path) -> None:
    train, val = lines(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "val.txt"
    val.write_text("v")
    corpus = run(tmp_path / "out", train, val=str(val))
    assert (decoded(corpus, "train"), decoded(corpus, "val")) == (["", "a", "b"], ["", "v"])
    assert [source["asked"] for source in corpus.manifest["sources"]] == [str(train), str(val)]


def test_validation_that_is_trained_on_too_is_remarked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    a = lines(tmp_path / "in" / "a.jsonl", ["one", "two"])
    link = tmp_path / "link.jsonl"
    link.symlink_to(a)
    for number, val in enumerate((link, a, tmp_path / "in")):
        corpus = run(tmp_path / f"out{number}", tmp_path / "in", val=str(val))
        assert corpus.manifest["validation"].endswith("are trained on too")
        assert "trained on too" in capsys.readouterr().err
    lines(tmp_path / "in" / "b.jsonl", ["three"])
    corpus = run(tmp_path / "apart", tmp_path / "in", val=str(a), deduplicate=True)
    assert corpus.manifest["validation"] == f"the documents of {a}"
    assert decoded(corpus, "train") == ["", "three"]


def test_fineweb_validates_on_its_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole documents, up to the first that the shard cannot hold."""
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    monkeypatch.setattr(encode, "BATCH_SIZE", 100)
    (tmp_path / "fineweb-edu").mkdir()
    texts = [f"document {i:03} " + "x" * (i % 7) for i in range(200)]
    lines(tmp_path / "fineweb-edu" / "a.jsonl", texts)
    corpus = run(tmp_path / "out", "fineweb-edu", shard_tokens=300)
    val = decoded(corpus, "val")[1:]
    assert decoded(corpus, "train")[1:] == texts[len(val) :]
    assert len(corpus.val) == 1
    assert 300 - 20 < corpus.val_tokens <= 300
    splits = corpus.manifest["splits"]
    assert [splits[name]["documents"] for name in ("train", "val")] == [200 - len(val), len(val)]
    assert splits["val"]["bytes"] == len("".join(val))


# --- nothing lost --------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    texts=st.lists(
        st.text("ab \né🙂<|endoftext|>", min_size=1, max_size=20), min_size=2, max_size=12
    ),
    shard_tokens=st.integers(2, 40),
    frame=st.integers(1, 50),
    piece=st.integers(1, 20),
    workers=st.integers(1, 3),
)
def test_no_token_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    shard_tokens: int,
    frame: int,
    piece: int,
    workers: int,
) -> None:
    """Documents of text files, whatever the sizes of pieces, frames and shards."""
    folder = tmp_path_factory.mktemp("c")
    kept = [text for text in texts if text.strip()]
    if len(kept) < 2:
        return
    (folder / "in").mkdir()
    for i, text in enumerate(kept):
        (folder / "in" / f"{i:02}.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_SIZE", frame)
        patch.setattr(text_files, "CHUNK_BYTES", piece)
        corpus = run(folder / "out", folder / "in", shard_tokens=shard_tokens, workers=workers)
    corpus.verify()
    shards = [corpus.train, corpus.val]
    assert all(len(shard) == shard_tokens for split in shards for shard in split[:-1])
    eos, found = corpus.tokenizer.eos_id, []
    for split in shards:
        ids = np.concatenate(split)
        assert ids[0] == eos
        documents = np.split(ids, np.flatnonzero(ids == eos))[1:]
        found += [d[1:].astype(np.uint8).tobytes().decode() for d in documents]
    assert sorted(found) == sorted(kept)
    records = corpus.manifest["splits"].values()
    assert sum(r["documents"] for r in records) == len(kept)
    assert sum(r["bytes"] for r in records) == sum(len(text.encode()) for text in kept)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    large = Tokenizer.byte().add_special_tokens([f"<{i}>" for i in range(1 << 16)])
    large.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("some text to be split")
    corpus = run(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.train[0].dtype == np.uint32
    small = run(tmp_path / "small", tmp_path / "a.txt")
    assert small.train[0].dtype == np.uint16


def test_a_foreign_tokenizer_gets_documents_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that puts a space before each text would put one before each piece."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(["<unk>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz\n"])}
    reference = Reference(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    reference.decoder = decoders.Metaspace(prepend_scheme="first")
    reference.add_special_tokens(["</s>"])
    reference.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("some text in many pieces\n" * 20)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 30)
    corpus = run(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.tokenizer.kind == "other"
    assert np.concatenate(corpus.train).tolist() == [
        corpus.tokenizer.eos_id,
        *corpus.tokenizer.encode(("some text in many pieces\n" * 20)[:450]),
    ]


def test_token_ids_are_stored_as_they_are(tmp_path: Path) -> None:
    rows = [[i % 256 for i in range(k, k + 64)] for k in range(0, 640, 64)]
    path = tmp_path / "ids.arrow"
    table = pa.table({"input_ids": rows, "labels": rows})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    corpus = run(tmp_path / "out", path)
    stream = np.concatenate([*corpus.train, *corpus.val])
    assert stream.tolist() == np.concatenate(rows).tolist()
    assert (corpus.train_tokens, corpus.val_tokens) == (576, 64)
    assert "blocks of one stream, labels: unshifted" in corpus.manifest["sources"][0]["rows"]
    assert corpus.bytes_per_token == 1
    with pytest.raises(ValueError, match="holds token ids; give the --tokenizer that made them"):
        run(tmp_path / "bpe", path, tokenizer="bpe")


# --- vocabulary ----------------------------------------------------------------------------------


def test_bpe_learns_from_the_training_documents_only(tmp_path: Path) -> None:
    texts = [f"word{i % 7} " * 30 for i in range(20)]
    (tmp_path / "val.txt").write_text("qqzzqqzz " * 500)
    corpus = run(
        tmp_path / "out",
        lines(tmp_path / "a.jsonl", texts),
        val=str(tmp_path / "val.txt"),
        tokenizer="bpe",
        vocab_size=300,
    )
    assert (corpus.tokenizer.kind, corpus.manifest["tokenizer"]["kind"]) == ("bpe", "bpe")
    assert corpus.tokenizer.vocab_size <= 300
    assert len(corpus.tokenizer.encode("word")) < 4
    assert len(corpus.tokenizer.encode("qqzz")) == 4


def test_a_large_corpus_is_sampled_for_its_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptsmith.data import vocabulary

    monkeypatch.setattr(vocabulary, "_SAMPLE", 20_000)
    texts = [f"common common rare{i:05}" * 4 for i in range(2000)]
    source = lines(tmp_path / "a.jsonl", texts)
    corpora = [run(tmp_path / name, source, tokenizer="bpe", vocab_size=500) for name in ("a", "b")]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert len(corpora[0].tokenizer.encode("common")) == 1


def test_a_character_unknown_to_a_given_tokenizer_is_named(tmp_path: Path) -> None:
    Tokenizer.char(["abc "]).save(tmp_path / "tokenizer.json")
    source = lines(tmp_path / "a.jsonl", ["abc", "abd", "cab"])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: character 'd' at offset 2"):
        run(tmp_path / "out", source, tokenizer=str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 20)
    with pytest.raises(ValueError, match="--vocab-size 500 is for --tokenizer bpe; byte has"):
        run(tmp_path / "out", tmp_path / "a.txt", vocab_size=500)
    with pytest.raises(FileNotFoundError, match="--tokenizer bpee: neither gpt2, bpe, char"):
        run(tmp_path / "out", tmp_path / "a.txt", tokenizer="bpee")
    os.mkfifo(tmp_path / "pipe")
    for special in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{special}: no regular file"):
            run(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(special))
    with pytest.raises(ValidationError):
        PrepareConfig(sources=(), out=tmp_path)
    with pytest.raises(ValidationError):  # the trainer would take the memory and abort
        PrepareConfig(sources=("a",), out=tmp_path, tokenizer="bpe", vocab_size=10**11)
    with pytest.raises(ValidationError):
        PrepareConfig(sources=("a",), out=tmp_path, colour="red")  # type: ignore[call-arg]
    assert not (tmp_path / "out").exists()


# --- choices and policies ------------------------------------------------------------------------


def test_exact_duplicates_are_left_out_on_request(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "three", "two", "one "]
    source = lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "val.txt").write_text("three")
    corpus = run(tmp_path / "out", source, val=str(tmp_path / "val.txt"), deduplicate=True)
    assert decoded(corpus, "train") == ["", "one", "two", "one "]  # "three" is in validation
    assert corpus.manifest["left_out"] == {"duplicate": 3}
    corpus = run(tmp_path / "all", source, val=str(tmp_path / "val.txt"))
    assert decoded(corpus, "train")[1:] == texts


def test_limits(tmp_path: Path) -> None:
    texts = [f"{i:09}" for i in range(500)]
    source = lines(tmp_path / "a.jsonl", texts)
    corpus = run(tmp_path / "d", source, max_documents=20)
    assert sorted(decoded(corpus, "train")[1:] + decoded(corpus, "val")[1:]) == texts[:20]
    corpus = run(tmp_path / "t", source, max_tokens=123, val_fraction=0.3)
    assert corpus.train_tokens == 123
    assert corpus.manifest["splits"]["train"]["documents"] == 13
    assert corpus.manifest["splits"]["train"]["bytes"] == 110
    (tmp_path / "one.txt").write_text("x" * 1000)
    corpus = run(tmp_path / "o", tmp_path / "one.txt", max_tokens=10)
    assert (corpus.train_tokens, corpus.val_tokens) == (10, 100)


def test_a_limit_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_SIZE", 50)
    texts = [f"{i:09}" if i % 5 else "" for i in range(500)]
    source = lines(tmp_path / "a.jsonl", texts)
    made = []
    for workers in (1, 2, 5):
        run(tmp_path / f"{workers}/c", source, max_tokens=1000, on_error="skip", workers=workers)
        made.append(snapshot(tmp_path / f"{workers}/c"))
    assert made[0] == made[1] == made[2]
    assert 0 < json.loads(made[0]["manifest.json"])["left_out"]["empty document"] < 100


def test_skipping_is_counted_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [b'{"text": "%03d"}' % i for i in range(50)]
    path.write_bytes(b"\n".join([*rows, b"{", b"}", b'{"text": ""}', b'{"text": "\xff"}']))
    with pytest.raises(ValueError, match=r"a\.jsonl:51: not JSON .*--on-error skip"):
        run(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()
    corpus = run(tmp_path / "out", path, on_error="skip", tokenizer="bpe", vocab_size=257)
    assert corpus.manifest["left_out"] == {
        "empty document": 1,
        "line that is not UTF-8": 1,
        "malformed line": 2,
    }
    assert corpus.manifest["settings"]["on_error"] == "skip"
    assert "skipped 1 empty document, 1 line that is not UTF-8, 2 malformed line" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "is empty"),
        (["", " "], {"on_error": "skip"}, r"no documents \(skipped: 2 empty document\)"),
        (["x"], {}, "1 characters leave nothing for training or nothing for validation"),
        (["s"] * 5, {"deduplicate": True}, "1 characters leave nothing"),
        ([f"{i}" for i in range(200)], {"val_fraction": 1e-6}, "nothing is left for validation"),
    ],
)
def test_a_corpus_with_nothing_in_a_split_is_an_error(
    tmp_path: Path, texts: list[str], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", lines(tmp_path / "a.jsonl", texts), **options)
    assert not (tmp_path / "out").exists()


def test_a_first_shard_that_takes_everything_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    (tmp_path / "fineweb-edu").mkdir()
    lines(tmp_path / "fineweb-edu" / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match=r"nothing is left for training.*smaller --shard-tokens"):
        run(tmp_path / "out", "fineweb-edu")


# --- the folder ----------------------------------------------------------------------------------


def test_the_same_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines(tmp_path / "a.jsonl", ["one", "two"])
    run(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    run(tmp_path / "out", source, workers=1)
    assert "this corpus is complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_another_corpus_is_refused_or_replaced_whole(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    out = tmp_path / "out"
    run(out, source, shard_tokens=3)
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(
        FileExistsError, match=r"shard_tokens: 3 before, 100000000 now\); .*--overwrite"
    ):
        run(out, source)
    with pytest.raises(FileExistsError, match="tokenizer: 'byte' before, 'char' now"):
        run(out, source, shard_tokens=3, tokenizer="char")
    lines(source, ["one", "two", "three", "four"])
    with pytest.raises(FileExistsError, match=r"a\.jsonl: bytes 50 before, 67 now\)"):
        run(out, source, shard_tokens=3)
    source.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        run(out, source, overwrite=True)
    assert snapshot(out) == before
    lines(source, ["one", "two", "four"])
    os.utime(source, ns=(0, time.time_ns() + 10**9))
    with pytest.raises(FileExistsError, match=r"a\.jsonl"):
        run(out, source, shard_tokens=3)
    corpus = run(out, source, overwrite=True)
    assert sorted(decoded(corpus, "train") + decoded(corpus, "val"))[2:] == ["four", "one", "two"]
    assert sorted(p.name for p in out.iterdir()) == [
        "manifest.json",
        "notes.txt",
        "tokenizer.json",
        "train-00000.npy",
        "val-00000.npy",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_out_may_be_a_link_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run(tmp_path / "link", source)
    assert len(run(tmp_path / "link", source, shard_tokens=2, overwrite=True).train) > 1
    assert len(Corpus.open(tmp_path / "real").train) > 1
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Tokenizer.char("ot").save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is not among the 2 of this tokenizer"):
        run(Path(), source, tokenizer=str(tmp_path / "tokenizer.json"))
    assert run(Path(), source).manifest["name"] == "here"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.jsonl", "here", "link", "real", "tokenizer.json"
    ]  # fmt: skip
    with pytest.raises(FileExistsError, match="--out /: holds other files and no corpus"):
        run(Path("/"), source)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"File exists: .*dangling"):
        run(tmp_path / "dangling", source)


def test_unfinished_replacement_does_not_change_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    out = tmp_path / "out"
    run(out, source)
    before = snapshot(out)
    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(out, source, shard_tokens=2, overwrite=True)
    run(out, source)
    assert f"{out / 'unfinished'}: left by --overwrite" in capsys.readouterr().err
    assert snapshot(out) == before
    assert len(run(out, source, shard_tokens=2, overwrite=True).train) > 1
    assert not (out / "unfinished").exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["one", "two"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds other files and no corpus"):
            run(out, source, overwrite=overwrite)
    with pytest.raises(FileExistsError, match=r"File exists: .*thesis\.txt"):
        run(out / "thesis.txt", source)
    assert snapshot(out) == {"thesis.txt": b"mine"}


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "out").mkdir()
    with (
        files.lock(tmp_path / "out", "or not"),
        pytest.raises(ValueError, match=r"out is in use by another process: .* --out"),
    ):
        run(tmp_path / "out", source)


# --- killed --------------------------------------------------------------------------------------

# The command with small batches and a pause after each, so that there is something to interrupt.
SLOW = """
import sys, time
from pathlib import Path
from gptsmith.data import corpus_writer, encode, text_files
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
encode.BATCH_SIZE, text_files.CHUNK_BYTES = 2000, 1000
corpus_writer._JOURNAL_SECONDS = 0.01
write = corpus_writer.CorpusWriter.write
def slow_write(self, parts, left_out):
    write(self, parts, left_out)
    time.sleep(float(sys.argv[3]))
corpus_writer.CorpusWriter.write = slow_write
source, out = Path(sys.argv[1]), Path(sys.argv[2])
prepare(PrepareConfig(
    sources=(str(source),), out=out, tokenizer="bpe", vocab_size=400, shard_tokens=5000,
    deduplicate=True, on_error="skip",
))
"""


def start(source: Path, out: Path, pause: float) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-W", "error", "-c", SLOW, str(source), str(out), str(pause)]
    return subprocess.Popen(words, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> str:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    return errors.decode()


@pytest.mark.parametrize("kind", ["one.txt", "many.jsonl"])
def test_killed_and_run_again_it_ends_the_same(tmp_path: Path, kind: str) -> None:
    """SIGKILL at several moments of one corpus; finished shards are not written again."""
    words = random.Random(1)
    texts = [
        " ".join(words.choices(["alpha", "beta", "gamma", "delta ", "ε"], k=words.randrange(0, 80)))
        for _ in range(600)
    ]
    source = tmp_path / kind
    if kind == "one.txt":
        source.write_text("\n".join(texts))
    else:
        lines(source, [*texts, *texts[:50]])
    whole, out = tmp_path / "whole" / "c", tmp_path / "killed" / "c"
    finish(start(source, whole, 0))
    expected = snapshot(whole)
    assert len([name for name in expected if name.startswith("train-")]) > 3

    work = out / "unfinished"
    finished: dict[Path, tuple[int, int]] = {}
    for shards in (0, 0, 1, 3):  # finished ones to wait for before the kill
        process = start(source, out, 0.02)
        while process.poll() is None:
            if len(shards_of(journal(work))) >= shards and journal(work):
                break
            time.sleep(0.002)
        time.sleep(words.random() * 0.1)
        process.kill()
        process.communicate()
        assert not (out / "manifest.json").exists()
        assert stamps(finished) == finished
        finished = stamps(work / name for name in shards_of(journal(work)))
    assert len(finished) >= 3
    (work / ".progress.tmp-0a1b2c3d.json").touch()  # as a kill while it is written leaves it
    assert "resuming after" in finish(start(source, out, 0))
    finished = {out / path.name: stamp for path, stamp in finished.items()}
    assert stamps(finished) == finished
    assert snapshot(out) == expected


def journal(work: Path) -> dict[str, Any]:
    """The state in the journal of an unfinished corpus."""
    path = work / "progress.json"
    return json.loads(path.read_text())["state"] or {} if path.exists() else {}


def shards_of(state: dict[str, Any]) -> list[str]:
    records = state.get("splits", {}).values()
    return [shard["file"] for record in records for shard in record["shards"]]


def stamps(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """What a file that is written again would not keep."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("kills", [1, 2])
def test_replacement_can_be_killed_at_any_file_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """The old corpus stays whole until the new one is, and the next call completes the move."""
    old, new = lines(tmp_path / "a.jsonl", ["one", "two", "three"]), tmp_path / "b.txt"
    new.write_text("four five six seven eight nine")
    options = {"shard_tokens": 9, "overwrite": True}
    run(tmp_path / "old" / "c", old, shard_tokens=3)
    run(tmp_path / "new" / "c", new, **options)
    before, after = snapshot(tmp_path / "old" / "c"), snapshot(tmp_path / "new" / "c")
    replace, unlink = os.replace, Path.unlink

    def prepare_with_kill(out: Path, at: int) -> bool:
        """Kill a call before its file operation number `at`; whether it came to that."""
        number = count()

        def operation(function: Any) -> Any:
            def call(*args: Any, **keywords: Any) -> Any:
                if next(number) >= at:
                    raise KeyboardInterrupt
                return function(*args, **keywords)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", operation(replace))
            patch.setattr(Path, "unlink", operation(unlink))
            with suppress(KeyboardInterrupt):
                run(out, new, **options)
                return False
        return True

    for at in range(100):
        out = tmp_path / str(at) / "c"
        shutil.copytree(tmp_path / "old" / "c", out)
        killed = [prepare_with_kill(out, at) for _ in range(kills)]
        if (out / "manifest.json").exists():
            assert snapshot(out) in (before, after)
        else:
            assert (out / "unfinished" / "manifest.json").exists()
        run(out, new, **options)
        assert snapshot(out) == after
        if not any(killed):
            break
    assert at > 10


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source and its unfinished corpus of some shards."""
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some words\n" * 500)
    write = CorpusWriter.write

    def fail(self: CorpusWriter, parts: Sequence[EncodedPart], left_out: dict[str, int]) -> None:
        if self.batches == 3:
            raise KeyboardInterrupt
        write(self, parts, left_out)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "BATCH_SIZE", 1000)
        patch.setattr(text_files, "CHUNK_BYTES", 500)
        patch.setattr(CorpusWriter, "write", fail)
        patch.setattr(corpus_writer, "_JOURNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(out, source, shard_tokens=700)
    assert (out / "unfinished" / "train-00000.npy").exists()
    return source, out


def test_an_unfinished_corpus_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = interrupted(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="unfinished"):
        Corpus.open(out)
    with pytest.raises(
        FileExistsError, match=r"another corpus, unfinished \(shard_tokens: 700 before"
    ):
        run(out, source)
    assert (out / "unfinished" / "train-00000.npy").exists()
    assert len(run(out, source, overwrite=True).train) == 1


def test_a_changed_source_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = interrupted(tmp_path, monkeypatch)
    source.write_text("more words\n" * 500)
    os.utime(source, ns=(0, time.time_ns() + 10**9))
    with pytest.raises(FileExistsError, match="has changed since"):
        run(out, source, shard_tokens=700)


def test_a_damaged_finished_shard_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = interrupted(tmp_path, monkeypatch)
    (out / "unfinished" / "train-00000.npy").write_bytes(b"short")
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    corpus = run(out, source, shard_tokens=700)
    assert "starting over" in capsys.readouterr().err
    corpus.verify()
    assert "".join(decoded(corpus, "train") + decoded(corpus, "val")) == "some words\n" * 500


def test_a_full_disk_is_named_and_can_be_mended(tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some words\n" * 5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*unfinished/train-00000\.npy"):
            run(out, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    corpus = run(out, source)
    assert "".join(decoded(corpus, "train") + decoded(corpus, "val")) == "some words\n" * 5000


# --- size ----------------------------------------------------------------------------------------

PEAK = r"""
import re, sys
from pathlib import Path
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
prepare(PrepareConfig(sources=(sys.argv[1],), out=Path(sys.argv[2]), tokenizer=sys.argv[3]))
print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    line = "It was a bright cold day in some month, and nobody counted the strokes of the clock.\n"
    Tokenizer.train_bpe([line * 100], 400).save(tmp_path / "tokenizer.json")
    peaks = []
    for megabytes in (8, 48):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(line * (megabytes * 1_000_000 // len(line)))
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"c{megabytes}")]
        command.append(str(tmp_path / "tokenizer.json"))
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(answer.stdout))
    assert peaks[1] < peaks[0] + 24_000, peaks


def test_progress_in_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptsmith.data import progress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    (tmp_path / "a.txt").write_text("words and more words\n" * 1000)
    run(tmp_path / "out", tmp_path / "a.txt")
    said = capsys.readouterr().err.splitlines()
    assert any("preparing: 100%, " in line and "MB/s" in line for line in said)
    assert any("train 18,901 tokens in 1 shard(s), 1 document(s)" in line for line in said)

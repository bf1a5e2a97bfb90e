"""From text to shards: nothing lost, nothing double; tokenizers, limits, skipped records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import decoded, run, snapshot, write_jsonl
from pydantic import ValidationError
from tables import write

from gptsmith.data import encode, text_files
from gptsmith.data.options import PrepareConfig
from gptsmith.tokenizer import Tokenizer

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
def test_prepared_corpus_contains_every_token(
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


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    large = Tokenizer.byte().add_special_tokens([f"<{i}>" for i in range(1 << 16)])
    large.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("some text to be split")
    corpus = run(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.train[0].dtype == np.uint32
    small = run(tmp_path / "small", tmp_path / "a.txt")
    assert small.train[0].dtype == np.uint16


def test_foreign_tokenizer_encodes_whole_documents(
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
    path = tmp_path / "stream.arrow"
    write(path, *({"input_ids": row, "labels": row} for row in rows))
    corpus = run(tmp_path / "out", path)
    stream = np.concatenate([*corpus.train, *corpus.val])
    assert stream.tolist() == np.concatenate(rows).tolist()
    assert (corpus.train_tokens, corpus.val_tokens) == (576, 64)
    assert "blocks of one stream, labels: unshifted" in corpus.manifest["sources"][0]["rows"]
    assert corpus.manifest["splits"]["val"]["bytes"] == 64
    with pytest.raises(ValueError, match="holds token ids; give the --tokenizer that made them"):
        run(tmp_path / "bpe", path, tokenizer="bpe")


# --- vocabulary ----------------------------------------------------------------------------------


def test_bpe_is_trained_on_training_documents_only(tmp_path: Path) -> None:
    texts = [f"word{i % 7} " * 30 for i in range(20)]
    (tmp_path / "val.txt").write_text("qqzzqqzz " * 500)
    corpus = run(
        tmp_path / "out",
        write_jsonl(tmp_path / "a.jsonl", texts),
        val=str(tmp_path / "val.txt"),
        tokenizer="bpe",
        vocab_size=300,
    )
    assert (corpus.tokenizer.kind, corpus.manifest["tokenizer"]["kind"]) == ("bpe", "bpe")
    assert corpus.tokenizer.vocab_size <= 300
    assert len(corpus.tokenizer.encode("word")) < 4
    assert len(corpus.tokenizer.encode("qqzz")) == 4


def test_bpe_is_trained_on_a_sample_of_a_large_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptsmith.data import corpus_tokenizer

    monkeypatch.setattr(corpus_tokenizer, "_SAMPLE", 20_000)
    texts = [f"common common rare{i:05}" * 4 for i in range(2000)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    corpora = [run(tmp_path / name, source, tokenizer="bpe", vocab_size=500) for name in ("a", "b")]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert len(corpora[0].tokenizer.encode("common")) == 1


def test_character_missing_from_a_given_tokenizer_is_an_error(tmp_path: Path) -> None:
    Tokenizer.char(["abc "]).save(tmp_path / "tokenizer.json")
    source = write_jsonl(tmp_path / "a.jsonl", ["abc", "abd", "cab"])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: character 'd' at offset 2"):
        run(tmp_path / "out", source, tokenizer=str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "out").exists()


def test_invalid_options(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 20)
    with pytest.raises(ValueError, match="--vocab-size 500 is for --tokenizer bpe; byte has"):
        run(tmp_path / "out", tmp_path / "a.txt", vocab_size=500)
    with pytest.raises(FileNotFoundError, match="--tokenizer bpee: neither gpt2, bpe, char"):
        run(tmp_path / "out", tmp_path / "a.txt", tokenizer="bpee")
    os.mkfifo(tmp_path / "pipe")
    for special in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{special}: not a regular file"):
            run(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(special))
    with pytest.raises(ValidationError):
        PrepareConfig(sources=(), out=tmp_path)
    with pytest.raises(ValidationError):  # the trainer would take the memory and abort
        PrepareConfig(sources=("a",), out=tmp_path, tokenizer="bpe", vocab_size=10**11)
    with pytest.raises(ValidationError):
        PrepareConfig(sources=("a",), out=tmp_path, colour="red")  # type: ignore[call-arg]
    assert not (tmp_path / "out").exists()


# --- choices and policies ------------------------------------------------------------------------


def test_exact_duplicates_are_skipped_on_request(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "three", "two", "one "]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "val.txt").write_text("three")
    corpus = run(tmp_path / "out", source, val=str(tmp_path / "val.txt"), deduplicate=True)
    assert decoded(corpus, "train") == ["", "one", "two", "one "]  # "three" is in validation
    assert corpus.manifest["left_out"] == {"duplicate": 3}
    corpus = run(tmp_path / "all", source, val=str(tmp_path / "val.txt"))
    assert decoded(corpus, "train")[1:] == texts


def test_limits_on_documents_and_tokens(tmp_path: Path) -> None:
    texts = [f"{i:09}" for i in range(500)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = run(tmp_path / "d", source, max_documents=20)
    assert sorted(decoded(corpus, "train")[1:] + decoded(corpus, "val")[1:]) == texts[:20]
    corpus = run(tmp_path / "t", source, max_tokens=123, val_fraction=0.3)
    assert corpus.train_tokens == 123
    assert corpus.manifest["splits"]["train"]["documents"] == 13
    assert corpus.manifest["splits"]["train"]["bytes"] == 110
    (tmp_path / "one.txt").write_text("x" * 1000)
    corpus = run(tmp_path / "o", tmp_path / "one.txt", max_tokens=10)
    assert (corpus.train_tokens, corpus.val_tokens) == (10, 100)


def test_limit_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_SIZE", 50)
    texts = [f"{i:09}" if i % 5 else "" for i in range(500)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    made = []
    for workers in (1, 2, 5):
        run(tmp_path / f"{workers}/c", source, max_tokens=1000, on_error="skip", workers=workers)
        made.append(snapshot(tmp_path / f"{workers}/c"))
    assert made[0] == made[1] == made[2]
    assert 0 < json.loads(made[0]["manifest.json"])["left_out"]["empty document"] < 100


def test_skipped_records_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert (
        "skipped 4 of 54 records (7.4%): 1 empty document, 1 line that is not UTF-8, 2 malf"
        in capsys.readouterr().err
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
def test_empty_split_is_an_error(
    tmp_path: Path, texts: list[str], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts), **options)
    assert not (tmp_path / "out").exists()


def test_first_shard_that_takes_all_documents_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    (tmp_path / "fineweb-edu").mkdir()
    write_jsonl(tmp_path / "fineweb-edu" / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match=r"nothing is left for training.*smaller --shard-tokens"):
        run(tmp_path / "out", "fineweb-edu")


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


def test_progress_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptsmith import progress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    (tmp_path / "a.txt").write_text("words and more words\n" * 1000)
    run(tmp_path / "out", tmp_path / "a.txt")
    said = capsys.readouterr().err.splitlines()
    assert any("preparing: 100%, " in line and "MB/s" in line for line in said)
    assert any("train 18,901 tokens in 1 shard, 1 document" in line for line in said)

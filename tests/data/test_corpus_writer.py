"""An interrupted `prepare` resumes, and the files are the same byte for byte."""

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from prepared import decoded, run, snapshot, write_jsonl

from gptsmith.data import corpus_writer, encode, text_files
from gptsmith.data.corpus_writer import CorpusWriter
from gptsmith.data.encode import Encoded, TextBatch
from gptsmith.data.shards import Corpus

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
def slow_write(self, batch, encoded):
    write(self, batch, encoded)
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
def test_resume_after_sigkill_is_byte_identical(tmp_path: Path, kind: str) -> None:
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
        write_jsonl(source, [*texts, *texts[:50]])
    whole, out = tmp_path / "whole" / "c", tmp_path / "killed" / "c"
    finish(start(source, whole, 0))
    expected = snapshot(whole)
    assert len([name for name in expected if name.startswith("train-")]) > 3

    work = out / "unfinished"
    finished: dict[Path, tuple[int, int]] = {}
    for shards in (0, 0, 1, 3):  # finished ones to wait for before the kill
        process = start(source, out, 0.02)
        while process.poll() is None:
            if (work / "progress.json").exists() and len(shards_of(journal(work))) >= shards:
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


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source and its unfinished corpus of some shards."""
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some words\n" * 500)
    write = CorpusWriter.write

    def fail(self: CorpusWriter, batch: TextBatch, encoded: Encoded) -> None:
        if self.batches == 3:
            raise KeyboardInterrupt
        write(self, batch, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "BATCH_SIZE", 1000)
        patch.setattr(text_files, "CHUNK_BYTES", 500)
        patch.setattr(CorpusWriter, "write", fail)
        patch.setattr(corpus_writer, "_JOURNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(out, source, shard_tokens=700)
    assert (out / "unfinished" / "train-00000.npy").exists()
    return source, out


def test_unfinished_corpus_with_other_settings_is_rejected(
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


def test_unfinished_corpus_with_a_changed_source_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = interrupted(tmp_path, monkeypatch)
    source.write_text("more words\n" * 500)
    os.utime(source, ns=(0, time.time_ns() + 10**9))
    with pytest.raises(FileExistsError, match="has changed since"):
        run(out, source, shard_tokens=700)


def test_damaged_shard_of_an_unfinished_corpus_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = interrupted(tmp_path, monkeypatch)
    (out / "unfinished" / "train-00000.npy").write_bytes(b"short")
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    corpus = run(out, source, shard_tokens=700)
    assert "starting over" in capsys.readouterr().err
    corpus.verify()
    assert "".join(decoded(corpus, "train") + decoded(corpus, "val")) == "some words\n" * 500


def test_resume_after_a_full_disk(tmp_path: Path) -> None:
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

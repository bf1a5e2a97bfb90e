"""Which folders `prepare` writes to, and how it replaces a corpus."""

import os
import shutil
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prepared import decoded, run, snapshot, write_jsonl

from gptsmith.data.corpus_writer import CorpusWriter
from gptsmith.data.shards import Corpus
from gptsmith.tokenizer import Tokenizer


def test_preparing_a_complete_corpus_again_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    run(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    run(tmp_path / "out", source, workers=1)
    assert "this corpus is complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_another_corpus_is_rejected_or_replaced(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
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
    write_jsonl(source, ["one", "two", "three", "four"])
    with pytest.raises(FileExistsError, match=r"a\.jsonl: bytes 50 before, 67 now\)"):
        run(out, source, shard_tokens=3)
    source.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        run(out, source, overwrite=True)
    assert snapshot(out) == before
    write_jsonl(source, ["one", "two", "four"])
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


def test_output_dir_may_be_a_link_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run(tmp_path / "link", source)
    assert len(run(tmp_path / "link", source, shard_tokens=2, overwrite=True).train) > 1
    assert len(Corpus.open(tmp_path / "real").train) > 1
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Tokenizer.char("ot").save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is not one of the 2 of this tokenizer"):
        run(Path(), source, tokenizer=str(tmp_path / "tokenizer.json"))
    assert run(Path(), source).manifest["name"] == "here"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.jsonl", "here", "link", "real", "tokenizer.json"
    ]  # fmt: skip
    with pytest.raises(FileExistsError, match="--out /: holds other files and no corpus"):
        run(Path("/"), source)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"dangling is a link that leads nowhere: choose"):
        run(tmp_path / "dangling", source)


def test_unfinished_replacement_does_not_change_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
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


def test_folder_with_other_files_is_rejected(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds other files and no corpus"):
            run(out, source, overwrite=overwrite)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file: choose another --out"):
        run(out / "thesis.txt", source)
    assert snapshot(out) == {"thesis.txt": b"mine"}


def test_second_process_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    finish = CorpusWriter.finish
    rejected = []

    def try_again(self: CorpusWriter) -> dict[str, Any]:
        with pytest.raises(ValueError, match=r"out is in use by another process: .* --out"):
            run(tmp_path / "out", source)
        rejected.append(True)
        return finish(self)

    monkeypatch.setattr(CorpusWriter, "finish", try_again)
    run(tmp_path / "out", source).verify()
    assert rejected == [True]


@pytest.mark.parametrize("kills", [1, 2])
def test_replacement_can_be_killed_at_any_file_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """The old corpus stays whole until the new one is, and the next call completes the move."""
    old, new = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"]), tmp_path / "b.txt"
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
            with pytest.raises(FileNotFoundError, match="unfinished"):
                Corpus.open(out)
        run(out, new, **options)
        assert snapshot(out) == after
        if not any(killed):
            break
    assert at > 10


def test_output_dir_that_is_a_loop_of_links(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileExistsError, match="loop is a link that leads nowhere: choose"):
        run(tmp_path / "loop", source)
    with pytest.raises(OSError, match="loop"):
        run(tmp_path / "loop" / "x", source)

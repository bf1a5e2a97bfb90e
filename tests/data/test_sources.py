"""Folders, patterns and names are resolved to sources."""

import os
from pathlib import Path

import pytest
from text_sources import read, texts

from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.sources import open_source


def test_folders_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/d.txt", "cache-1.arrow"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    report = ReadReport()
    assert texts(open_source(str(tmp_path), ReadOptions(), report).documents()) == [
        "a.txt",
        "b.txt",
        "deep/c.md",
    ]
    assert "1 .md, 2 .txt are read; 1 .png not" in next(iter(report.hints))
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(f"{tmp_path}/**/*.md") == ["deep/c.md"]


def test_folder_without_read_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    access = os.access  # as for a user who is not root
    monkeypatch.setattr(os, "access", lambda p, mode: access(p, mode) and p.name != "closed")
    with pytest.raises(PermissionError, match="closed: no permission to read this folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.txt", FileNotFoundError, r"gone\.txt: no such file or folder"),
        ("*.txt", FileNotFoundError, "no file matches this pattern"),
        ("empty", FileNotFoundError, r"no table .* and no text file in this folder"),
        ("notes.pdf", ValueError, r"notes\.pdf is a PDF, not text"),
        ("pipe.txt", ValueError, r"pipe\.txt: neither a file nor a folder"),
        ("splits", ValueError, "holds the splits test, train; name one"),
    ],
)
def test_missing_or_unsuitable_path_is_named(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pdf").write_text("%PDF-1.7")
    os.mkfifo(tmp_path / "pipe.txt")
    for split in ("train", "test"):
        (tmp_path / "splits" / split).mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    with pytest.raises(error, match=message):
        read(tmp_path / name)


def test_misspelt_corpus_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'pydoc': no such .* did you mean 'pydocs'"):
        open_source("pydoc", ReadOptions(), ReadReport())
    with pytest.raises(ValueError, match=r"'zzz': no such .* corpora are pydocs, "):
        open_source("pydocs|zzz", ReadOptions(), ReadReport())
    with pytest.raises(ValueError, match="an empty name"):
        open_source("pydocs|", ReadOptions(), ReadReport())


def test_file_names_with_special_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a|b.txt", "c*.txt", "d[e].txt", "f\ng.txt", " h.txt"):
        (tmp_path / name).write_text("text")
        assert read(tmp_path / name) == ["text"]
    monkeypatch.chdir(tmp_path)
    assert read(" h.txt") == ["text"]


def test_alternative_source_is_used_and_the_reason_recorded(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    asked = f"{tmp_path}/a.txt|{tmp_path}/b.txt|pydocs"
    source = open_source(asked, ReadOptions(), ReadReport())
    assert (source.requested, source.used) == (asked, f"{tmp_path}/b.txt")
    assert source.unavailable == (f"{tmp_path}/a.txt: no such file or folder",)
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such .*; .*c\.txt: no such"):
        open_source(f"{tmp_path}/a.txt|{tmp_path}/c.txt", ReadOptions(), ReadReport())

"""Folders, patterns and names are resolved to sources."""

import gzip
import os
from pathlib import Path

import pytest
from text_sources import opened, read

from gptsmith.data.report import ReadReport


def test_folders_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/d.txt", "cache-1.arrow"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    report = ReadReport()
    assert read(tmp_path, report) == [
        "a.txt",
        "b.txt",
        "deep/c.md",
    ]
    assert "1 .md, 2 .txt are read, 1 .png not" in next(iter(report.hints))
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)
    assert read(f"{tmp_path}/**/*.md") == ["deep/c.md"]
    (tmp_path / "deep" / "circle").unlink()


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
        opened("pydoc")
    with pytest.raises(ValueError, match=r"'zzz': no such .* corpora are pydocs, "):
        opened("pydocs|zzz")
    with pytest.raises(ValueError, match="an empty name"):
        opened("pydocs|")


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
    source = opened(asked)
    assert (source.requested, source.used) == (asked, f"{tmp_path}/b.txt")
    assert source.unavailable == (f"{tmp_path}/a.txt: no such file or folder",)
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such .*; .*c\.txt: no such"):
        opened(f"{tmp_path}/a.txt|{tmp_path}/c.txt")


def test_source_files_are_text_whatever_their_name(tmp_path: Path) -> None:
    names = ("a.py", "b.rs", "Makefile", "deep/c.tex", "README.md")
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "__init__.py").touch()
    (tmp_path / "blank.py").write_text("\n")
    (tmp_path / "a.pyc").write_bytes(b"\xa7\r\r\n\0\0\0\0")
    (tmp_path / "package.json").write_text("{}")
    report = ReadReport()
    assert sorted(read(tmp_path, report)) == sorted(f"text of {name}" for name in names)
    assert report.skipped.counts() == {"empty file": 2}
    assert report.lines()[0] == "skipped 2 of 7 records (28.6%)"
    assert "are read, 1 .json, 1 .pyc not" in next(iter(report.hints))
    assert read(f"{tmp_path}/*.py") == ["text of a.py"]
    assert read(tmp_path / "Makefile") == ["text of Makefile"]
    with pytest.raises(ValueError, match=r"a\.pyc is a binary file, not text"):
        read(tmp_path / "a.pyc")
    with pytest.raises(ValueError, match=r"__init__\.py: the file is empty"):
        read(tmp_path / "__init__.py")


def test_files_beside_tables_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "loader.py").write_text("import datasets")
    (tmp_path / "empty.jsonl").touch()
    report = ReadReport()
    assert read(tmp_path, report) == ["a"]
    assert report.skipped.counts() == {"empty file": 1}
    assert "1 .py not" in next(iter(report.hints))


def test_folder_of_empty_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"its files \(2\) are all empty"):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_encoding_of_a_text_file_is_found_out(tmp_path: Path, encoding: str) -> None:
    text = "Größe und Maß.\r\n" * 99
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    report = ReadReport()
    assert read(tmp_path / "a.txt", report) == [text]
    assert "read as" in next(iter(report.hints))
    lines = read(tmp_path / "a.txt", document_separator="\r\n")
    assert lines == ["Größe und Maß."] * 99


def test_encoding_of_a_text_file_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Привет".encode("cp1251"))
    with pytest.raises(ValueError, match=r"not UTF-8; .*--encoding"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", encoding="cp1251") == ["Привет"]
    with pytest.raises(ValueError, match=r"a\.txt:1: not ASCII; name another --encoding"):
        read(tmp_path / "a.txt", encoding="ascii")


def test_compressed_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some words"))
    assert read(tmp_path / "a.txt.gz") == ["some words"]
    assert read(tmp_path) == ["some words"]


def test_text_without_a_place_to_cut_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptsmith.data.text_files.LINE_LIMIT", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"a" * (3 << 20))
    with pytest.raises(ValueError, match="1 MiB without a space or line end"):
        read(tmp_path / "a.txt")

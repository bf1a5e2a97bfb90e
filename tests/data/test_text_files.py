"""Text files are read whole, in chunks that do not change the token ids."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_sources import read

from gptsmith.data import text_files
from gptsmith.data.report import ReadReport
from gptsmith.data.text_files import TextFile, safe_cut
from gptsmith.tokenizer import Tokenizer


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("line\r\nzwei ü\n\n".encode())
    assert read(path) == ["line\r\nzwei ü\n\n"]
    path.write_bytes(b"\xef\xbb\xbfno mark")
    assert read(path) == ["no mark"]


def test_separator_divides_a_file_into_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n\n<|endoftext|>three")
    for size in (1, 2, 3, 5, 7, 1000):  # wherever the blocks end
        monkeypatch.setattr(text_files, "CHUNK_BYTES", size)
        assert read(path, document_separator="<|endoftext|>") == ["one", "two\nlines", "three"]
    path.write_text("one\nmore\n\n\n\ntwo\n\nthree\n")
    assert read(path, document_separator="\n\n") == ["one\nmore", "two", "three"]


def test_unused_separator_in_a_text_gives_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\ntwo")
    report = ReadReport()
    assert len(read(path, report)) == 1
    assert "--document-separator" in next(iter(report.hints))


@settings(max_examples=150)
@given(text=st.text(max_size=60), size=st.integers(1, 20))
def test_chunks_of_a_text_file_join_to_its_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", size)
        expected = text.removeprefix("\ufeff")
        assert "".join(TextFile(path, ReadReport())) == expected
        assert "".join(TextFile(path, ReadReport("skip"))) == expected


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    words = "it's don't we'll they've 12 345 a1b2 x_y, (the) cat's -- \n\n\t  tabs  and   spaces é"
    return Tokenizer.train_bpe([words * 9, "ééé 日本 — “quoted”  text" * 9], 300)


# Characters that the split pattern distinguishes, and some that it does not.
ALPHABET = st.sampled_from("ab'std relv1² \t\n\r\x0b\x1c\x85\xa0\u2003\u3000é日\u0301_!-<|…🙂")


@settings(max_examples=400)
@given(text=st.text(ALPHABET, max_size=30) | st.text(max_size=30))
def test_safe_cut_does_not_change_the_ids(bpe: Tokenizer, text: str) -> None:
    cut = safe_cut(text)
    assert bpe.encode(text[:cut]) + bpe.encode(text[cut:]) == bpe.encode(text)


@settings(max_examples=150)
@given(text=st.text(ALPHABET, max_size=80), size=st.integers(1, 9))
def test_ids_of_chunks_are_the_ids_of_the_whole_text(
    bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", size)
        ids = [i for piece in TextFile(path, ReadReport()) for i in bpe.encode(piece)]
    assert ids == bpe.encode(text)


def test_safe_cut_of_text_without_spaces() -> None:
    assert safe_cut("x" * 5000 + "," + "y" * 5000) == 5000
    assert safe_cut("x" * 5000) == 0
    assert safe_cut("one two  ") == len("one two")


def test_invalid_utf8_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nalso fine\nnot \xff fine\nfine again\n")
    with pytest.raises(ValueError, match=r"a\.txt:3: not UTF-8"):
        read(path)
    report = ReadReport("skip")
    for _ in range(2):  # however often it is read, each line counts once
        assert read(path, report) == ["fine\nalso fine\nfine again\n"]
    assert report.skipped.counts() == {"line that is not UTF-8": 1}
    assert report.lines()[0] == "skipped 1 of 4 records (25.0%)"
    path.write_bytes(b"not \xff fine\nno line end")
    report = ReadReport("skip")
    read(path, report)
    assert report.lines()[0] == "skipped 1 of 2 records (50.0%)"


def test_invalid_utf8_error_is_independent_of_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("zeile ü\n".encode() * 100 + b"bad \xe9")
    for size in (1, 10, 64, 4096):
        monkeypatch.setattr(text_files, "CHUNK_BYTES", size)
        with pytest.raises(ValueError, match=r"a\.txt:101: not UTF-8"):
            list(TextFile(path, ReadReport()))


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b" \n\n", "white space")])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: .*{message}.*--on-error skip"):
        read(path)
    assert read(path, ReadReport("skip")) == []

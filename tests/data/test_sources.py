"""Every kind of source is read whole and in order; every kind of bad input is named."""

import gzip
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import complete_data
from hypothesis import given, settings
from hypothesis import strategies as st
from local_web import Site

from gptsmith.data import corpora, text_files
from gptsmith.data.documents import row_documents
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.sources import open_source
from gptsmith.data.text_files import TextFile, safe_cut
from gptsmith.tokenizer import Tokenizer

ROWS = ["first text", "second\ntext", 'third "text", ünïcode 🙂']


def read(asked: str | Path, **options: Any) -> list[str]:
    """The texts of a source's documents."""
    on_error = "skip" if options.pop("skip", False) else "stop"
    return texts(open_source(str(asked), ReadOptions(**options), ReadReport(on_error)).documents())


def texts(documents) -> list[str]:  # type: ignore[no-untyped-def]
    return ["".join(document.chunks) for document in documents]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- text files ----------------------------------------------------------------------------------


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
    assert len(list(open_source(str(path), ReadOptions(), report).documents())) == 1
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


# Characters about which the split pattern cares, and some about which it does not.
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


def test_invalid_utf8_error_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nalso fine\nnot \xff fine\nfine again\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3, byte 19: not UTF-8"):
        read(path)
    report = ReadReport("skip")
    source = open_source(str(path), ReadOptions(), report)
    for _ in range(2):  # however often it is read, each line counts once
        assert texts(source.documents()) == ["fine\nalso fine\nfine again\n"]
    assert report.skipped.counts() == {"line that is not UTF-8": 1}


def test_invalid_utf8_error_is_independent_of_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("zeile ü\n".encode() * 100 + b"bad \xe9")
    for size in (1, 10, 64, 4096):
        monkeypatch.setattr(text_files, "CHUNK_BYTES", size)
        with pytest.raises(ValueError, match="line 101, byte 904: not UTF-8"):
            list(TextFile(path, ReadReport()))


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b" \n\n", "white space")])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: .*{message}.*--on-error skip"):
        read(path)
    assert read(path, skip=True) == []


# --- rows ----------------------------------------------------------------------------------------


def write(path: Path, rows: list[str]) -> Path:
    """`rows` in the format that the name says."""
    table = pa.table({"id": range(len(rows)), "text": rows})
    if path.name.endswith(".gz"):
        path.write_bytes(
            gzip.compress("".join(json.dumps({"text": r}) + "\n" for r in rows).encode())
        )
    elif path.suffix == ".jsonl":
        jsonl(path, [{"id": i, "text": row} for i, row in enumerate(rows)])
    elif path.suffix == ".csv":
        quoted = ['"' + row.replace('"', '""') + '"' for row in rows]
        path.write_text("id,text\n" + "".join(f"{i},{q}\n" for i, q in enumerate(quoted)))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.stem == "stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "stream.arrow"]
)
def test_each_row_is_a_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    assert read(path) == ROWS
    assert read(path, text_column="text") == ROWS
    with pytest.raises(ValueError, match=r"no column 'body'; there are .*'text'"):
        read(path, text_column="body")


def test_a_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('sentence\tlabel\n"it begins\t1\nand ends"\t0\n')
    assert read(path) == ['"it begins', 'and ends"']


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "x", "content": "y"}, "text"),
        ({"id": "7", "content": "y"}, "content"),
        ({"id": 7, "utterance": "y"}, "utterance"),
    ],
)
def test_obvious_text_column_is_found(tmp_path: Path, row: dict, column: str) -> None:
    assert read(jsonl(tmp_path / "a.jsonl", [row])) == [row[column]]


def test_unclear_text_column_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*'question', 'answer'; say --text-column"):
        read(path)
    assert read(path, text_column="answer") == ["y"]


def test_a_csv_without_a_header_line_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ham,Go until jurong point\nspam,Free entry\n")
    with pytest.raises(ValueError, match=r"a\.csv:2: .*There are 'ham'.*--text-column.*first line"):
        read(path)


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b'{"text": "cut', "malformed line", "not JSON"),
        (b"7", "malformed line", "a row must be a JSON object"),
        (b"[1, 2]", "row without text", "'text' is missing"),
        (b'{"body": "x"}', "row without text", "'text' is missing"),
        (b'{"text": 3}', "row without text", "'text' is not text"),
        (b'{"text": "\xff"}', "line that is not UTF-8", "not UTF-8"),
        (rb'{"text": "\ud800"}', "row that is not UTF-8", "not valid Unicode at character 0"),
        (b'{"text": " "}', "empty document", "an empty document"),
    ],
)
def test_bad_line_is_an_error_or_skipped(
    tmp_path: Path, line: bytes, kind: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "better"}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {message}"):
        read(path)
    report = ReadReport("skip")
    assert texts(open_source(str(path), ReadOptions(), report).documents()) == ["good", "better"]
    assert report.skipped.counts() == {kind: 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1,two,three", "3 fields where the header has 2"),
        (b'1,"two"x', "cannot be read"),
        (b"1,\xff", "not UTF-8"),
        (b"1,", "empty document"),
    ],
)
def test_bad_csv_row_is_an_error_or_skipped(tmp_path: Path, row: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n0,"a\nb"\n' + row + b"\n2,last\n")
    with pytest.raises(ValueError, match=rf"a\.csv:4: .*{message}"):
        read(path)
    assert read(path, skip=True) == ["a\nb", "last"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("text_column", ["text", None])
def test_duplicate_column_names_are_refused(
    tmp_path: Path, name: str, text_column: str | None
) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        arrays = [pa.array([text]) for text in "ab"]
        pq.write_table(pa.Table.from_arrays(arrays, names=["text", "text"]), path)
    else:
        path.write_text("text,id,text\na,1,b\n".replace(",", "\t" if name == "a.tsv" else ","))
    with pytest.raises(ValueError, match=rf"{name}.*: two columns are called 'text'; rename one"):
        read(path, text_column=text_column)


def test_several_unnamed_columns_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text,,\n0,a,,\n")
    assert read(tmp_path / "a.csv") == ["a"]


def test_dictionary_and_view_columns_are_text(tmp_path: Path) -> None:
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.string_view()):
        pq.write_table(pa.table({"text": pa.array(ROWS).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ROWS


def test_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le"):
        (tmp_path / "a.csv").write_bytes("id,text\n1,x\n".encode(encoding))
        with pytest.raises(ValueError, match=r"a\.csv:1: the header line is not UTF-8; save"):
            read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('"the\nid",\u00a0text,text\n1,x,y\n')
    assert read(tmp_path / "a.csv") == ["y"]


def test_null_in_a_table_is_an_error_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' is missing"):
        read(path)
    assert read(path, skip=True) == ["a", "c"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_damaged_file_error_names_the_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ["some text " * 1000] * 50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be read|damaged)"):
        read(path)
    path.write_bytes(b"rubbish, and enough of it to be looked at")
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be read|damaged)"):
        read(path)


def test_text_column_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="'text' holds int64, not text"):
        read(path)


# --- folders, patterns, names --------------------------------------------------------------------


def test_folders_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/d.txt", "notes.pdf", "cache-1.arrow"):
        (tmp_path / name).write_text(name)
    report = ReadReport()
    assert texts(open_source(str(tmp_path), ReadOptions(), report).documents()) == [
        "a.txt",
        "b.txt",
        "deep/c.md",
    ]
    assert "3 files are read, 1 of other kinds not" in next(iter(report.hints))
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(f"{tmp_path}/**/*.md") == ["deep/c.md"]


def test_folder_without_read_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    access = os.access  # as of somebody who is not root
    monkeypatch.setattr(os, "access", lambda p, mode: access(p, mode) and p.name != "closed")
    with pytest.raises(PermissionError, match="closed: no permission to read this folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.txt", FileNotFoundError, r"gone\.txt: no such file or folder"),
        ("*.txt", FileNotFoundError, "no file matches this pattern"),
        ("empty", FileNotFoundError, r"no file of \.txt, .* in this folder"),
        ("notes.pdf", ValueError, r"notes\.pdf: not a file of \.txt"),
        ("pipe.txt", ValueError, r"pipe\.txt: neither a file nor a folder"),
        ("splits", ValueError, "holds the splits test, train; name one"),
    ],
)
def test_missing_or_unsuitable_path_is_named(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pdf").write_text("x")
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
    assert (source.asked, source.used) == (asked, f"{tmp_path}/b.txt")
    assert source.passed == (f"{tmp_path}/a.txt: no such file or folder",)
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such .*; .*c\.txt: no such"):
        open_source(f"{tmp_path}/a.txt|{tmp_path}/c.txt", ReadOptions(), ReadReport())


# --- corpora by name -----------------------------------------------------------------------------


def test_pydocs_is_english_about_python() -> None:
    documents = {d.place: "".join(map(str, d.chunks)) for d in corpora.pydocs()}
    assert 1_500_000 < sum(map(len, documents.values())) < 4_000_000
    assert "class TextWrapper" in documents["textwrap"]
    assert "The lazy import" not in documents["textwrap"]
    assert "while" in documents["topic while"]
    assert list(documents) == [d.place for d in corpora.pydocs()]
    assert "this" not in sys.modules
    assert "antigravity" not in sys.modules  # it would have opened a browser


def test_pycode_is_source() -> None:
    documents = {d.place: "".join(map(str, d.chunks)) for d in corpora.pycode()}
    assert documents["textwrap.py"] == Path(sys.modules["textwrap"].__file__ or "").read_text()
    assert not [place for place in documents if "/tests/" in place]


@pytest.mark.parametrize("name", ["wikipedia", "openwebtext", "fineweb-edu", "wikitext-103"])
def test_corpus_without_network_says_where_to_put_files(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"put {name}/.*GPTSMITH_DATA"):
        open_source(name, ReadOptions(), ReadReport())


def test_hub_name_without_network_is_an_error_with_a_remedy() -> None:
    with pytest.raises(FileNotFoundError, match=r"^owner/name: not to be had .* their folder inst"):
        open_source("owner/name", ReadOptions(), ReadReport())


def test_shakespeare_without_network_says_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpora, "_SHAKESPEARE", "http://127.0.0.1:9/input.txt")  # nobody listens
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(FileNotFoundError, match=r"put http://.* into .*tinyshakespeare/input\.txt"):
        open_source("shakespeare", ReadOptions(), ReadReport())


def test_shakespeare_needs_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"home directory.* set XDG_CACHE_HOME"):
        open_source("shakespeare", ReadOptions(), ReadReport())
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/here")
    with pytest.raises(FileNotFoundError, match=r"/dev/null/here.* set XDG_CACHE_HOME"):
        open_source("shakespeare", ReadOptions(), ReadReport())


@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "wikitext-2/train.txt"])
def test_invalid_utf8_in_a_named_corpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.with_name("valid.txt").write_text(" = A = \n text\n")
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    path.write_bytes(b" = A = \n\n one \n \xff two\n\n = B = \n")
    corpus = name.partition("/")[0].replace("tiny", "")
    with pytest.raises(ValueError, match=rf"{path}, line 4, byte 16: not UTF-8"):
        read(corpus)
    kept = list(open_source(corpus, ReadOptions(), ReadReport("skip")).documents())
    assert "".join("".join(map(str, d.chunks)) for d in kept) == " = A = \n\n one \n\n = B = \n"


def test_shakespeare_is_downloaded_once_and_verified(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = b"First Citizen"
    monkeypatch.setattr(corpora, "_SHAKESPEARE", f"{site.url}/input.txt")
    monkeypatch.setattr(corpora, "_SHAKESPEARE_SIZE", len(text))
    monkeypatch.setattr(corpora, "_SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    site.files["/input.txt"] = b"Third Citizen"
    with pytest.raises(ValueError, match=r"^shakespeare: .* it is deleted, run this again"):
        read("shakespeare")
    site.files["/input.txt"] = text
    site.asked.clear()
    assert read("shakespeare") == read("shakespeare") == ["First Citizen"]
    assert len(site.asked) == 1


def test_named_corpus_is_found_in_the_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    (tmp_path / "fineweb-edu").mkdir()
    write(tmp_path / "fineweb-edu" / "000.parquet", ROWS)
    source = open_source("fineweb-edu", ReadOptions(), ReadReport())
    assert texts(source.documents()) == ROWS
    assert source.first_shard
    assert not open_source("pydocs", ReadOptions(), ReadReport()).first_shard


def test_wikitext_is_cut_into_articles() -> None:
    lines = (
        " \n = One = \n \n text\n = = Part = = \n \n x = y = \n = not a title = \n \n = Two = \n"
    )
    found = texts(corpora.articles(lines.splitlines(keepends=True), "w"))
    assert [text.count("\n") for text in found] == [9, 1]
    assert "".join(found) == lines


@pytest.mark.parametrize(("articles", "of_validation"), [(4, 2), (601, 60)])
def test_wikitext_2(
    articles: int, of_validation: int, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"wikitext-2/train.txt": 10_797_148, "wikitext-2/valid.txt": 1_121_681}
    folder = real_data if articles == 4 else complete_data(sizes)
    monkeypatch.setenv("GPTSMITH_DATA", str(folder))
    source = open_source("wikitext", ReadOptions(), ReadReport())
    train = texts(source.documents())
    assert source.validation is not None
    val = texts(source.validation())
    assert source.used == "wikitext-2"
    assert (len(train), len(val)) == (articles, of_validation)
    assert "".join(train) == (folder / "wikitext-2" / "train.txt").read_text()
    assert "".join(val) == (folder / "wikitext-2" / "valid.txt").read_text()


def test_tinystories(real_data: Path) -> None:
    path = real_data / "tinystories_sample" / "tinystories_10k.txt"
    stories = read(path, document_separator="<|endoftext|>")
    assert len(stories) == 12
    assert "endoftext" not in "".join(stories)
    assert len(read(path)) == 1


def test_rows_of_the_hub_are_streamed(tmp_path: Path) -> None:
    """`datasets` reads a folder as it reads the Hub, which no test may reach."""
    pytest.importorskip("datasets")
    jsonl(tmp_path / "train.jsonl", [{"id": i, "text": row} for i, row in enumerate(ROWS)])
    rows = corpora.hub_rows(corpora.HubName(str(tmp_path)), None)
    assert texts(row_documents(rows, ReadOptions(), ReadReport())) == ROWS


# --- token ids -----------------------------------------------------------------------------------


def ids_of(tmp_path: Path, **columns: list[list[int]]) -> tuple[str, list[list[int]]]:
    """What is found in a table of ids: its layout, and the documents."""
    from gptsmith.data.tokenized import tokenized_documents

    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table(columns), path)
    report = ReadReport()
    layout = open_source(str(path), ReadOptions(), report).layout
    assert layout is not None
    found = tokenized_documents([path], layout, eos_id=0, vocab_size=100, report=report)
    return str(layout), [np.concatenate(list(d.chunks)).tolist() for d in found]


def test_rows_of_ids_are_documents(tmp_path: Path) -> None:
    layout, found = ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 9], [0, 1, 2, 3], [4, 0]])
    assert "one document each, labels: none" in layout
    assert found == [[5, 6, 7], [8, 9], [0, 1, 2, 3], [4]]


def test_rows_of_equal_length_are_a_stream(tmp_path: Path) -> None:
    layout, found = ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 0, 9], [1]])
    assert "one stream" in layout
    assert found == [[5, 6, 7, 8, 0, 9, 1]]


def test_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    for bad in (-2, 100):
        with pytest.raises(ValueError, match=rf"row 2: token id {bad} is outside .* 0\.\.99"):
            ids_of(tmp_path, input_ids=[[5, 6], [99, bad, 7]])


def test_shift_of_labels_is_detected(tmp_path: Path) -> None:
    ids = [[5, 6, 7], [8, 9, 1]]
    layout, found = ids_of(tmp_path, input_ids=ids, labels=[[5, 6, 7], [-100, 9, 1]])
    assert "one stream, labels: unshifted" in layout
    assert found == [[5, 6, 7, 8, 9, 1]]
    layout, found = ids_of(tmp_path, input_ids=ids, labels=[[6, 7, 8], [9, 1, 2]])
    assert "one stream, labels: shifted" in layout
    assert found == [[5, 6, 7, 8, 9, 1, 2]]
    layout, found = ids_of(tmp_path, input_ids=ids, labels=[[6, 7, 4], [9, 1, -100]])
    assert "one document each, labels: shifted" in layout
    assert found == [[5, 6, 7, 4], [8, 9, 1]]


def test_padding_is_removed(tmp_path: Path) -> None:
    mask = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    _, found = ids_of(tmp_path, input_ids=[[5, 6, 0], [7, 0, 0], [8, 9, 1]], attention_mask=mask)
    assert found == [[5, 6], [7], [8, 9, 1]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 1, 1], [8, 9, 1]], "row 1: labels are neither"),
        ([[5, 6, 7], [9, 1, 2]], "some rows fit one reading, some the other"),
        ([[-100, -100, -100]] * 2, "both readings fit"),
        ([[5, 6], [8, 9]], "2 labels for 3 input_ids"),
    ],
)
def test_ambiguous_labels_are_refused(
    tmp_path: Path, labels: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 9, 1]], labels=labels)


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 2: token id 100 is outside .* 0\.\.99"):
        ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 100]])


def test_text_next_to_ids_needs_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "both.parquet"
    pq.write_table(pa.table({"text": ["ab"], "input_ids": [[1, 2]]}), path)
    with pytest.raises(ValueError, match="--text-column text or --text-column input_ids"):
        open_source(str(path), ReadOptions(), ReadReport())
    assert read(path, text_column="text") == ["ab"]
    assert (
        open_source(str(path), ReadOptions(text_column="input_ids"), ReadReport()).layout
        is not None
    )
    (tmp_path / "a.txt").write_text("text")
    pq.write_table(pa.table({"input_ids": [[1, 2]]}), path)
    with pytest.raises(ValueError, match=r"both\.parquet holds token ids, .*a\.txt does not"):
        open_source(str(tmp_path), ReadOptions(), ReadReport())


def test_ids_of_a_wrong_type_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"input_ids": ["1 2"]}), path)
    with pytest.raises(ValueError, match="'input_ids' holds string, not lists of token ids"):
        open_source(str(path), ReadOptions(), ReadReport())

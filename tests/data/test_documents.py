"""Rows of every table format become documents; bad rows are an error or skipped."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import write
from text_sources import ROWS, read, write_rows

from gptsmith.data.report import ReadReport


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "stream.arrow"]
)
def test_each_row_is_a_document(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    assert read(path) == ROWS
    assert read(path, text_column="text") == ROWS
    with pytest.raises(ValueError, match=r"no column 'body', only .*'text'"):
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
    assert read(write(tmp_path / "a.jsonl", row)) == [row[column]]


def test_unclear_text_column_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "x", "answer": "y"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*'question', 'answer' with --text-column"):
        read(path)
    assert read(path, text_column="answer") == ["y"]


def test_a_table_without_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: has no columns"):
        read(tmp_path / "a.parquet")


def test_a_csv_without_a_header_line_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ham,Go until jurong point\nspam,Free entry\n")
    with pytest.raises(ValueError, match=r"a\.csv:2: .*from 'ham'.*--text-column.*first line"):
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
        (rb'{"text": "\ud800"}', "row that is not UTF-8", "not Unicode at character 0"),
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
    assert read(path, report) == ["good", "better"]
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
    assert read(path, ReadReport("skip")) == ["a\nb", "last"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("text_column", ["text", None])
def test_duplicate_column_names_are_rejected(
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


def test_column_names_with_line_ends_and_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"the\nid",\u00a0text,text\n1,x,y\n')
    assert read(tmp_path / "a.csv") == ["y"]


def test_null_in_a_table_is_an_error_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' is missing"):
        read(path)
    assert read(path, ReadReport("skip")) == ["a", "c"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_damaged_file_error_names_the_file(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ["some text " * 1000] * 50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be read|damaged)"):
        read(path)
    path.write_bytes(b"rubbish, and enough of it to be looked at")
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be read|damaged|not JSON)"):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("data", [b"", b"PAR1PAR1", b"ARROW1\0\0ARROW1", bytes(100)])
def test_remains_of_a_table_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be read|damaged)") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_text_column_of_another_type_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="'text' holds int64, not text"):
        read(path)

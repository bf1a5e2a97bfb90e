"""Every clear form of a JSON file gives its rows; any other says what it is."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data import json_rows
from gptsmith.data.options import FileFormat
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import read_rows

ROWS = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(path: Path, data: str | bytes, report: ReadReport | None = None) -> list[Any]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row.values for row in read_rows(path, report)]


@pytest.mark.parametrize(
    "value",
    [
        ROWS,
        {"data": ROWS},
        {"version": "1.0", "license": None, "examples": ROWS},
        {"17": ROWS[0], "18": ROWS[1]},
        {"a-1": ROWS[0], "b-2": ROWS[1]},
        {"text": ["one", "two"], "label": ["a", "b"]},
        {"text": {"0": "one", "1": "two"}, "label": {"0": "a", "1": "b"}},  # pandas: to_json()
        {"columns": ["text", "label"], "index": [0, 1], "data": [["one", "a"], ["two", "b"]]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_in_one_value(tmp_path: Path, value: Any, indent: int | None) -> None:
    assert read(tmp_path / "a.json", json.dumps(value, indent=indent)) == ROWS


@pytest.mark.parametrize("others", [{}, {"id": ["x", "y"]}])
def test_columns_may_hold_conversations(tmp_path: Path, others: dict[str, Any]) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[::-1]}]
    rows = [row | {k: v[i] for k, v in others.items()} for i, row in enumerate(rows)]
    lists = {name: [row[name] for row in rows] for name in rows[0]}
    numbered = {name: dict(zip("01", cells, strict=True)) for name, cells in lists.items()}
    for value in (lists, numbered):  # of datasets: to_dict(), and of pandas: to_json()
        assert read(tmp_path / "a.json", json.dumps(value)) == rows


def test_what_the_rows_are_is_said(tmp_path: Path) -> None:
    report = ReadReport()
    read(tmp_path / "a.json", json.dumps({"examples": ROWS}), report)
    read(tmp_path / "b.json", json.dumps({"x": ROWS[0], "y": ROWS[1]}), report)
    assert "its rows are those of 'examples'" in " ".join(report.hints)
    assert "its rows are the 2 fields of one object" in " ".join(report.hints)
    places = [row.place for row in read_rows(tmp_path / "b.json")]
    assert places == [f"{tmp_path / 'b.json'}, 'x'", f"{tmp_path / 'b.json'}, 'y'"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": TURNS, "id": "7"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "i", "completions": [{"text": "a"}, {"text": "b"}]},
        {"text": "one"},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_may_be_a_row(tmp_path: Path, row: Any, indent: int | None) -> None:
    assert read(tmp_path / "a.json", json.dumps(row, indent=indent)) == [row]
    assert read(tmp_path / "a.jsonl", json.dumps(row, indent=indent)) == [row]


def test_conversations_without_names(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", json.dumps(TURNS)) == [{"messages": TURNS}]
    two = json.dumps({"c1": TURNS, "c2": TURNS})
    assert read(tmp_path / "b.json", two) == [{"messages": TURNS}] * 2


def test_rows_printed_over_several_lines(tmp_path: Path) -> None:
    printed = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    for name in ("a.json", "a.jsonl"):
        assert read(tmp_path / name, printed) == ROWS
        assert read(tmp_path / name, json.dumps(ROWS, indent=1)) == ROWS
    assert read(tmp_path / "b.json", '"one"\n"two"\n') == [{"text": "one"}, {"text": "two"}]
    assert read(tmp_path / "rows.txt", "\n".join(map(json.dumps, ROWS))) == ROWS


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_encoding_is_found_out(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"text": "café"}, {"text": "naïve"}]
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read(tmp_path / name, data.encode(encoding)) == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of rows ('train', 'test')"),
        ('{"rows": []}', "without rows ('rows')"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
        ('[{"a": 1}, {"a"', "not JSON"),
        ('{"a": "\t"}', "not JSON (Invalid control character at column 8)"),
        ('{"a": "b', "not JSON (Unterminated string starting at column 7)"),
        ("7", "a row must be a JSON object, this is 7"),
    ],
)
def test_other_values_are_one_line(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "a.json", data)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}")
    assert len(str(caught.value)) < 250


def test_long_lines_and_values_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LINE_LIMIT", 1000)
    monkeypatch.setattr(json_rows, "_SMALL_LIMIT", 1000)
    long = json.dumps({"text": "x" * 5000})
    lines = "\n".join([json.dumps(ROWS[0]), long, json.dumps(ROWS[1])])
    report = ReadReport("skip")
    assert read(tmp_path / "a.jsonl", lines, report) == ROWS
    assert report.lines()[1] == f"skipped, line that is too long: 1 ({tmp_path / 'a.jsonl'}:2)"
    data = gzip.compress(b"[" + b"[]," * 100_000 + b"[]]")
    with pytest.raises(ValueError, match=r"b\.json\.gz: more than 0 MiB in one JSON value"):
        read(tmp_path / "b.json.gz", data)
    monkeypatch.setattr(json_rows, "_WHOLE_LIMIT", 4000)
    assert read(tmp_path / "c.json", json.dumps([{"text": "x" * 3000}], indent=1))
    with pytest.raises(
        ValueError, match=r"d\.json: more than 0 MiB in one JSON value; write a row"
    ):
        read(tmp_path / "d.json", json.dumps([{"text": "x" * 5000}], indent=1))


def test_an_uncompressed_file_may_be_named_gz(tmp_path: Path) -> None:
    data = "\n".join(map(json.dumps, ROWS))
    assert read(tmp_path / "a.jsonl.gz", data) == ROWS
    assert read(tmp_path / "b.jsonl", gzip.compress(data.encode())) == ROWS


def test_file_format_reaches_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "мир"}\n'.encode("cp1251"))
    with pytest.raises(ValueError, match=r"not UTF-8; .* name its encoding with --encoding"):
        list(read_rows(tmp_path / "a.jsonl"))
    (row,) = read_rows(tmp_path / "a.jsonl", file_format=FileFormat(encoding="cp1251"))
    assert row.values == {"text": "мир"}

"""Delimiter and encoding of a .csv are detected; rows after an unclosed quote are not lost."""

from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.csv_rows import detect_delimiter
from gptsmith.data.options import FileFormat
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import read_rows


def read(path: Path, data: str | bytes, report: ReadReport | None = None, **form: Any) -> list:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row.values for row in read_rows(path, report, file_format=FileFormat(**form))]


# --- quotes without an end -----------------------------------------------------------------------


def lines(first: int, last: int) -> str:
    return "".join(f"text {i},label {i % 2}\n" for i in range(first, last))


@pytest.mark.parametrize(
    ("bad", "rest", "found"),
    [
        ('"He said hello,a\n', lines(20, 520), 520),  # up to the end of the file
        ('"He said hello,a\n', lines(20, 40) + '"a, b",x\n' + lines(40, 60), 61),  # up to a quote
        ('"He said hello,a\n', lines(20, 40) + 'a pipe of 5",x\n' + lines(40, 60), 61),
        ('x,"\n', lines(20, 40) + 'x,""\n' + lines(40, 60), 61),
        ('"one,a\n"two,b\n', lines(20, 60), 60),  # the second one is behind the first
    ],
)
def test_rows_behind_an_unclosed_quote_are_found(
    tmp_path: Path, bad: str, rest: str, found: int
) -> None:
    path, report = tmp_path / "a.csv", ReadReport("skip")
    data = "text,label\n" + lines(0, 20) + bad + rest
    rows = read(path, data, report)
    lost = bad.count("\n")
    assert len(rows) == found
    assert [row["text"] for row in rows[19:21]] == ["text 19", "text 20"]
    assert report.lines()[0].startswith(f"skipped {lost} of {found + lost} records (")
    assert f"{path}:22" in report.lines()[1]
    with pytest.raises(
        ValueError, match=r"a\.csv:22: a field in quotes begins here and has no end"
    ):
        read(path, data, ReadReport("stop"))


@pytest.mark.parametrize(
    "text",
    [
        "Dear all,\nyours, Bob\nPS, see you",
        "Paris, France\nRome, Italy\nOslo, Norway\nBern, Swiss\nLima, Peru\nBonn, West\nUlm, South",
        "x,y\n1,2\n3,4\n5,6\n7,8\n9,10\n11,12\n13,14",  # a table in a cell
        "\n".join(f"line {i}" for i in range(3000)),
    ],
)
@pytest.mark.parametrize("row", ['"{}",x\n', 'x,"{}"\n'])
def test_texts_of_many_lines_stay_whole(tmp_path: Path, text: str, row: str) -> None:
    rows = read(tmp_path / "a.csv", "a,b\n1,2\n" + row.format(text) + "3,4\n")
    assert len(rows) == 3
    assert text in rows[1].values()


def test_a_very_long_field_is_one_lost_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptsmith.data.csv_rows.LINE_LIMIT", 1000)
    report = ReadReport("skip")
    long = "1,2\n" + "x" * 5000 + ",2\n3,4\n"
    assert read(tmp_path / "a.csv", "a,b\n" + long, report) == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]
    assert report.skipped.counts() == {"malformed row": 1}


# --- delimiter and encoding ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "delimiter"),
    [
        ("text,label\n" + "a; b; c,x\n" * 9, ","),
        ("text,label\n" + '"a; b",x\n' * 9, ","),
        ("text\n" + "a; b\n" * 9, ","),  # one column: nothing to divide
        ("text;label\n" + "a, b, c;x\n" * 9, ";"),
        ("id;price;text\n" + "1;2,50;a, b\n" * 9, ";"),
        ('spam;"Buy; now, today"\nham;See you, Bob, at 5\nham;fine\n', ";"),
        ("id|text\n1|a, b\n2|c\n", "|"),
        ("id\ttext\n1\ta, b\n2\tc\n", "\t"),
        ("text,label\n" + "a,x\n" * 9 + "a,b,x\n" * 3, ","),  # malformed rows
        ("text;label\n" + "a;x\n" * 9 + "a;b;x\n" * 3, ";"),
        ("a,b;c\n" + "1,2;3\n" * 9, ","),  # either: the usual one
        ("", ","),
    ],
)
def test_delimiter_is_found_out(sample: str, delimiter: str) -> None:
    assert detect_delimiter(sample, ",") == delimiter


def test_quotes_may_follow_a_space(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = read(path, 'label, text\nham, "See you, Bob"\nspam, "Win, now"\n')
    assert [row["text"] for row in rows] == ["See you, Bob", "Win, now"]
    # elsewhere a space is part of the field
    assert read(path, "label,text\nham, see you\n") == [{"label": "ham", "text": " see you"}]
    for data in ('[{"label": "ham"}]', '{"text": "see you", "label": "ham"}\n', "[\n  {\n"):
        with pytest.raises(ValueError, match=r"a\.csv is JSON, not a \.csv: name it \.json, or"):
            read(path, data)


ROW = {"text": "Das Café, sagte er", "label": "gut"}


@pytest.mark.parametrize(
    ("encoding", "delimiter", "said"),
    [
        ("utf-8", ",", []),
        ("utf-8-sig", ",", []),
        ("cp1252", ";", ["read as cp1252, as it is", "read with the delimiter ';'"]),
        ("latin-1", ",", ["read as cp1252, as it is"]),
        ("utf-16", "\t", ["read as UTF-16", "read with the delimiter '\\t'"]),  # Excel's text
        ("utf-16-le", ",", ["read as UTF-16-LE"]),
        ("utf-16-be", ";", ["read as UTF-16-BE", "read with the delimiter ';'"]),
        ("utf-32", ",", ["read as UTF-32"]),
    ],
)
@pytest.mark.parametrize("separator_line", [False, True])
def test_encoding_is_found_out_and_said_once(
    tmp_path: Path, encoding: str, delimiter: str, said: list[str], separator_line: bool
) -> None:
    text = f'text{delimiter}label\r\n"{ROW["text"]}"{delimiter}{ROW["label"]}\r\n' * 1
    text = f"sep={delimiter}\r\n{text}" if separator_line else text
    report = ReadReport()
    assert read(tmp_path / "a.csv", text.encode(encoding), report) == [ROW]
    for hint, words in zip(report.hints, said, strict=True):
        assert hint.startswith(f"{tmp_path / 'a.csv'}: {words}")


def test_given_delimiter_and_encoding(tmp_path: Path) -> None:
    data = "text~label\nПривет, мир~a\n".encode("cp1251")
    report = ReadReport()
    rows = read(tmp_path / "a.csv", data, report, delimiter="~", encoding="cp1251")
    assert (rows, list(report.hints)) == ([{"text": "Привет, мир", "label": "a"}], [])
    assert read(tmp_path / "b.csv", "a\tb,c\n1\t2\n", delimiter="tab") == [{"a": "1", "b,c": "2"}]
    for wrong in ({"delimiter": ";;"}, {"delimiter": "\n"}, {"encoding": "utf-9"}):
        with pytest.raises(ValueError, match="should be"):
            FileFormat(**wrong)


def test_half_a_character_of_utf16_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: not UTF-16"):
        read(tmp_path / "a.csv", "text,label\nx,y\n".encode("utf-16")[:-1])

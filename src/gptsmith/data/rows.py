"""Rows of tables: .json .jsonl .csv .tsv (each also .gz) .parquet .arrow, with their places.

Files are streamed, except a .json file that holds one list.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptsmith.data import columnar
from gptsmith.data.columns import quoted
from gptsmith.data.paths import find_files, has_suffix
from gptsmith.data.report import ReadReport

_TEXT = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), *columnar.SUFFIXES)

_BOM = b"\xef\xbb\xbf"  # of UTF-8; some programs begin a file with it


class Row(NamedTuple):
    """A row of a table. place: "file:line" or "file, row n". values: by column; None for null."""

    place: str
    values: dict[str, Any]


def read_rows(
    path: str | Path, report: ReadReport | None = None, *, header: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of a file, of all files in a folder, or of those that match a pattern, in order.

    A line of JSON that is a list becomes a row with a single column, `messages`.
    report: what to do with rows that cannot be read (default: ValueError).
    header: names of the columns where a .csv or .tsv has no header line.
    ValueError naming file and line.
    """
    for file in row_files(path):
        yield from file_rows(file, report or ReadReport(), header=header)


def row_files(path: str | Path) -> list[Path]:
    """The files of rows of a path or pattern, sorted. FileNotFoundError if there are none."""
    return find_files(path, SUFFIXES)


def file_rows(
    path: Path,
    report: ReadReport,
    *,
    header: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """The rows of one file. columns: those to read (Parquet and Arrow only)."""
    if path.stat().st_size == 0:
        report.reject("empty file", str(path), "the file is empty")
    elif has_suffix(path, *columnar.SUFFIXES):
        yield from _columnar_rows(path, report, columns)
    elif has_suffix(path, ".csv", ".tsv", ".csv.gz", ".tsv.gz"):
        yield from _csv_rows(path, report, header)
    else:
        yield from _json_rows(path, report)


def check_unicode(row: Row, name: str, text: str) -> None:
    """ValueError naming place and column of a text that is not Unicode."""
    if problem := unicode_problem(text):
        raise ValueError(f"{row.place}: {name!r} is {problem}")


def unicode_problem(text: str) -> str:
    """Where a text has a lone surrogate, which JSON can encode and UTF-8 cannot; "" if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not Unicode at character {error.start}"
    return ""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as stored, for its position, and the file to read from; they differ for .gz."""
    with path.open("rb") as raw:
        if not has_suffix(path, ".gz"):
            yield raw, raw
            return
        try:
            with gzip.open(raw) as file:
                yield raw, file  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error})") from None


# --- JSON ----------------------------------------------------------------------------------------


def _json_rows(path: Path, report: ReadReport) -> Iterator[Row]:
    if has_suffix(path, ".json", ".json.gz"):
        with _opened(path) as (_, file):
            start = file.read(1 << 12).removeprefix(_BOM).lstrip()
        # one list of all rows, or a list per line
        if start.startswith(b"[") and (rows := _whole_list(path)) is not None:
            for number, value in enumerate(rows, 1):
                if row := _json_row(value, f"{path}, row {number}", report):
                    yield row
            return
    with _opened(path) as (raw, file):
        for number, line in enumerate(file, 1):
            report.reached(path, raw.tell())
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line.removeprefix(_BOM) if number == 1 else line)
            except UnicodeDecodeError as error:
                report.reject("line that is not UTF-8", place, f"not UTF-8 ({error.reason})")
            except (ValueError, RecursionError) as error:
                hint = "; use a line per row, or a .json file with one list" if number == 1 else ""
                report.reject("malformed line", place, _reason(error) + hint)
            else:
                if row := _json_row(value, place, report):
                    yield row


def _whole_list(path: Path) -> list[Any] | None:
    """The rows of a file that is a single list; None if each line is a list."""
    with _opened(path) as (_, file):
        data = file.read().removeprefix(_BOM)
    try:
        rows: list[Any] = json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise ValueError(f"{path}:{error.lineno}: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from None
    return rows


def _json_row(value: Any, place: str, report: ReadReport) -> Row | None:
    """A JSON value as a row; None if it is not a row, which `report` counts."""
    if isinstance(value, dict):
        return Row(place, value)
    if isinstance(value, list):
        return Row(place, {"messages": value})
    problem = f"a row must be a JSON object, this is {json.dumps(value)[:40]}"
    report.reject("malformed line", place, problem)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return "not JSON (nested too deeply)" if isinstance(error, RecursionError) else str(error)


# --- CSV, Parquet, Arrow -------------------------------------------------------------------------


def _csv_rows(path: Path, report: ReadReport, header: Sequence[str] | None) -> Iterator[Row]:
    """Bytes that are not UTF-8 are decoded as lone surrogates and reported with their row: strict
    decoding would fail at the end of a buffer, far from that row."""
    csv.field_size_limit(sys.maxsize)
    # A .tsv has no quoting (IANA text/tab-separated-values): " is an ordinary character.
    dialect: dict[str, Any] = {"strict": True}
    if has_suffix(path, ".tsv", ".tsv.gz"):
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    names = list(header) if header is not None else None
    with (
        _opened(path) as (raw, opened),
        io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="") as file,
    ):
        rows = csv.reader(file, **dialect)
        while True:
            place = f"{path}:{rows.line_num + 1}"
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                report.reject("malformed row", place, f"cannot be read ({error})")
                continue
            report.reached(path, raw.tell())
            if not values:
                continue
            if names is None:
                names = values
                if unicode_problem("".join(names)) or "\0" in "".join(names):  # UTF-16, for example
                    raise ValueError(f"{place}: the header line is not UTF-8; save it as UTF-8")
                _check_unique(names, place)
            elif len(values) != len(names):
                problem = f"{len(values)} fields where the header has {len(names)}"
                report.reject("malformed row", place, problem)
            elif unicode_problem("".join(values)):
                problem = "not UTF-8; save the file as UTF-8"
                report.reject("row that is not UTF-8", place, problem)
            else:
                yield Row(place, dict(zip(names, values, strict=True)))


def _columnar_rows(path: Path, report: ReadReport, columns: Sequence[str] | None) -> Iterator[Row]:
    names = columnar.read_schema(path).names
    _check_unique(names, str(path))
    number = 0
    for batch in columnar.read_batches(path, columns or names, report):
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, row {number + 1} or later: {error}") from None
        for row in values:
            number += 1
            yield Row(f"{path}, row {number}", row)


def _check_unique(names: Sequence[str], place: str) -> None:
    """ValueError for two columns of the same name, of which a row could hold only one. Columns
    without a name, such as an index that pandas wrote, are not read and may occur repeatedly."""
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(
                f"{place}: two columns are called {name!r}; rename one of {quoted(names)}"
            )

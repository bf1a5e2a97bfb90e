"""Rows of any table: .json .jsonl .csv .tsv (each also .gz) .parquet .arrow, with their places.

Tuning sets need all columns of a row, of whatever type; documents.py and tables.py make text for
pretraining out of one column. Read in a stream, but for a .json file that holds one list.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptsmith.data.documents import Reader, named_files
from gptsmith.data.tables import table_batches, table_schema

_TEXT = (".json", ".jsonl", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), *_TABLES)

# What `datasets` keeps beside its .arrow files.
_NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "state.json")
_PIECE = 512  # rows of a table turned into Python objects at a time


class Row(NamedTuple):
    """place: "file:line", or "file, row n"; values: by column, None where a table is empty."""

    place: str
    values: dict[str, Any]


def read_rows(
    path: str | Path, reader: Reader | None = None, *, header: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of a file, of all files in a folder, or of those that fit a pattern, in order.

    A line of JSON that is a bare list becomes a row with the one column `messages`.
    reader: what to do with rows that cannot be read (None: ValueError), and its progress.
    header: names of the columns where a .csv or .tsv has no header line.
    ValueError naming file and line, for a column that stands twice too.
    """
    for file in row_files(path):
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty")
        if _is(file, *_TABLES):
            yield from _table_rows(file, reader or Reader())
        elif _is(file, ".csv", ".tsv", ".csv.gz", ".tsv.gz"):
            yield from _csv_rows(file, reader, header)
        else:
            yield from _json_rows(file, reader)


def row_files(path: str | Path) -> list[Path]:
    """The files behind a path or pattern, sorted. FileNotFoundError if there are none."""
    path = Path(path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise ValueError(f"{path}: holds the splits {', '.join(splits)}; name one of them")
        found = sorted(
            p
            for p in path.rglob("*")
            if p.is_file()
            and _is(p, *SUFFIXES)
            and p.name not in _NOT_ROWS
            and not any(part.startswith((".", "cache-")) for part in p.relative_to(path).parts)
        )
        if not found:
            raise FileNotFoundError(f"{path}: no file of {', '.join(SUFFIXES)} in this folder")
        return found
    return named_files(path, SUFFIXES)


def listed(names: Iterable[str]) -> str:
    """Column names for a message."""
    return ", ".join(repr(name) for name in names)


def check_unicode(row: Row, name: str, text: str) -> None:
    """ValueError naming the place for a lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(f"{row.place}: {name!r} is not Unicode at character {at}") from None


def _is(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)


def _problem(reader: Reader | None, kind: str, place: str, what: str) -> None:
    if reader is None:
        raise ValueError(f"{place}: {what}")
    reader.problem(kind, place, what)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it lies on disk and as it reads, which differ for .gz."""
    with path.open("rb") as raw:
        if not _is(path, ".gz"):
            yield raw, raw
            return
        try:
            with gzip.open(raw) as file:
                yield raw, file  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error})") from None


# --- JSON ----------------------------------------------------------------------------------------


def _json_rows(path: Path, reader: Reader | None) -> Iterator[Row]:
    if _is(path, ".json", ".json.gz"):
        with _opened(path) as (_, file):
            start = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):  # one list of all rows; else rows of lists, read line by line
            rows = _whole_list(path)
            if rows is not None:
                for number, value in enumerate(rows, 1):
                    yield from _json_row(value, f"{path}, row {number}", reader)
                return
    with _opened(path) as (raw, file):
        for number, line in enumerate(file, 1):
            if reader is not None:
                reader.reached(path, raw.tell())
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except UnicodeDecodeError as error:
                _problem(reader, "line that is not UTF-8", place, f"not UTF-8 ({error.reason})")
            except (ValueError, RecursionError) as error:
                hint = "; a row is one line, or a .json file one list" if number == 1 else ""
                _problem(reader, "malformed line", place, _reason(error) + hint)
            else:
                yield from _json_row(value, place, reader)


def _whole_list(path: Path) -> list[Any] | None:
    """The file's rows if it is one list; None if more follows, as where each line is a list."""
    with _opened(path) as (_, file):
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        rows: list[Any] = _parse(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise ValueError(f"{path}:{error.lineno}: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from None
    return rows


def _json_row(value: Any, place: str, reader: Reader | None) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(place, value)
    elif isinstance(value, list):
        yield Row(place, {"messages": value})
    else:
        what = f"a row must be a JSON object, this is {json.dumps(value)[:40]}"
        _problem(reader, "malformed line", place, what)


def _parse(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return "not JSON (nested too deeply)" if isinstance(error, RecursionError) else str(error)


# --- tables --------------------------------------------------------------------------------------


def _csv_rows(path: Path, reader: Reader | None, header: Sequence[str] | None) -> Iterator[Row]:
    """Bytes that are not UTF-8 come through as lone surrogates and are reported with their row:
    decoding strictly would fail at a buffer's end, far from the row at fault."""
    csv.field_size_limit(sys.maxsize)
    # A .tsv has no quotes (IANA text/tab-separated-values): a lone " is just that.
    dialect: dict[str, Any] = {"strict": True}
    if _is(path, ".tsv", ".tsv.gz"):
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
                _problem(reader, "malformed row", place, f"cannot be read ({error})")
                continue
            if reader is not None:
                reader.reached(path, raw.tell())
            if not values:
                continue
            if names is None:
                names = values
                _refuse_twice(names, place)
            elif len(values) != len(names):
                what = f"{len(values)} fields where the header has {len(names)}"
                _problem(reader, "malformed row", place, what)
            elif not all(map(_is_unicode, values)):
                _problem(reader, "row that is not UTF-8", place, "not UTF-8; save the file as that")
            else:
                yield Row(place, dict(zip(names, values, strict=True)))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _table_rows(path: Path, reader: Reader) -> Iterator[Row]:
    names = table_schema(path).names
    _refuse_twice(names, str(path))
    number = 0
    for batch in table_batches(path, names, reader):
        for start in range(0, len(batch), _PIECE):
            try:
                values = batch.slice(start, _PIECE).to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, row {number + 1} or later: {error}") from None
            for row in values:
                number += 1
                yield Row(f"{path}, row {number}", row)


def _refuse_twice(names: Sequence[str], place: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{place}: the column {name!r} stands twice; there are {listed(names)}"
            )

"""Rows of JSON files: a value on each line, or all rows in one value.

That value may be a list of rows, an object that holds one such list, an object whose fields are the
rows, columns as pandas writes them, or a single row.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gptsmith.data.columns import MESSAGES, PROMPT_AND_RESPONSE, ROLE, quoted
from gptsmith.data.decode import (
    LINE_LIMIT,
    NOT_UTF8,
    Encoding,
    find_encoding,
    opened,
    too_long,
)
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row

_UNIT = "use a line per row, or a .json file with one list"
# A compressed file may unpack to this many bytes of one value, or to this many times its size.
_WHOLE_LIMIT, _WHOLE_RATIO = LINE_LIMIT, 50
_COLUMNS = {*MESSAGES, *(name for pair in PROMPT_AND_RESPONSE for name in pair)}
_SPACE = re.compile(r"\s*")


def json_rows(path: Path, report: ReadReport, given: str | None) -> Iterator[Row]:
    """given: the encoding, if it is not to be found out."""
    encoding = find_encoding(path, given)
    if encoding.note:
        report.hint(f"{path}: read as {encoding.note}")
    values = _whole(path, encoding, report)
    if values is None:
        yield from _line_rows(path, encoding, report)
        return
    report.read[path] = len(values)
    for place, value in values:
        if row := _row(value, place, report):
            yield row


def _row(value: Any, place: str, report: ReadReport) -> Row | None:
    """A JSON value as a row; None if it is not a row, which `report` counts."""
    if isinstance(value, dict):
        return Row(place, value)
    if isinstance(value, list):
        return Row(place, {"messages": value})
    if isinstance(value, str):
        return Row(place, {"text": value})
    problem = f"a row must be a JSON object, this is {json.dumps(value)[:40]}"
    report.reject("malformed line", place, problem)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON (nested too deeply)"
    return "not JSON (a number of too many digits)"


# --- a value on each line ------------------------------------------------------------------------


def _line_rows(path: Path, encoding: Encoding, report: ReadReport) -> Iterator[Row]:
    number = blank = 0
    with _line_reader(path, encoding) as (raw, read_line):
        try:
            for number, line in enumerate(iter(read_line, b""), 1):
                if not number % 256:
                    report.reached(path, raw.tell())
                place = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) >= LINE_LIMIT and too_long(line, read_line):
                    problem = f"a line of more than {LINE_LIMIT >> 20} MiB; {_UNIT}"
                    report.reject("line that is too long", place, problem)
                    continue
                try:
                    value = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8 ({error.reason}); {NOT_UTF8}"
                    report.reject("line that is not UTF-8", place, problem)
                except (ValueError, RecursionError) as error:
                    if line.strip():
                        hint = f"; {_UNIT}" if number == 1 else ""
                        report.reject("malformed line", place, _reason(error) + hint)
                    else:
                        blank += 1
                else:
                    if row := _row(value, place, report):
                        yield row
        finally:
            report.read[path] = number - blank
            report.reached(path, raw.tell())


@contextmanager
def _line_reader(path: Path, encoding: Encoding) -> Iterator[tuple[BinaryIO, Callable[[], bytes]]]:
    """The file as stored, and a function that gives the next line in UTF-8, or a part of it where
    it is very long; b"" at the end."""
    with opened(path) as (raw, file):
        if encoding.is_utf8:
            yield raw, partial(file.readline, LINE_LIMIT)
            return
        with io.TextIOWrapper(file, encoding.name, "surrogateescape", newline="\n") as text:
            try:
                yield raw, lambda: text.readline(LINE_LIMIT).encode(errors="surrogateescape")
            except UnicodeDecodeError as error:  # half a character of UTF-16
                name = error.encoding.upper()
                raise ValueError(f"{path}: not {name} ({error.reason}); {NOT_UTF8}") from None


# --- all rows in one value -----------------------------------------------------------------------


def _whole(path: Path, encoding: Encoding, report: ReadReport) -> list[tuple[str, Any]] | None:
    """Places and rows of a file that is not a value per line; None if it is."""
    with _line_reader(path, encoding) as (_, read_line):
        lines = iter(read_line, b"")
        first = next((line for line in lines if line.strip()), b"").removeprefix(codecs.BOM_UTF8)
        has_more = any(line.strip() for line in lines)
    is_json = has_suffix(path, ".json", ".json.gz")
    try:
        values = [json.loads(first)]
    except (ValueError, RecursionError):
        begins = first.strip() in (b"{", b"[", b"[{", b"[[", b"{[")  # printed over several lines
        if not begins and not is_json:
            return None
        values = _values(path, encoding)
    else:
        if has_more or (isinstance(values[0], dict) and not is_json):
            return None
        rows = _rows_in(values[0], path, report)
        return None if [row for _, row in rows] == values else rows  # a line that is a row
    if len(values) == 1:
        return _rows_in(values[0], path, report)
    return [(f"{path}, row {n}", value) for n, value in enumerate(values, 1)] or None


def _values(path: Path, encoding: Encoding) -> list[Any]:
    """The JSON values that follow each other in a file; none if some lines are values, so that the
    lines should be read one by one. ValueError naming the line of what is not JSON."""
    text = _text(path, encoding)
    values: list[Any] = []
    decoder, at = json.JSONDecoder(), 0
    try:
        while (at := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except json.JSONDecodeError as error:
        if any(map(_is_row, islice(io.StringIO(text), 1, 10))):
            return []
        raise ValueError(f"{path}:{error.lineno}: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from None
    return values


def _text(path: Path, encoding: Encoding) -> str:
    with opened(path) as (raw, file):
        size = path.stat().st_size
        limit = max(_WHOLE_LIMIT, _WHOLE_RATIO * size) if file is not raw else -1
        data = file.read(limit)
        if len(data) == limit:
            raise ValueError(
                f"{path}: {size:,} bytes unpack to more than {limit >> 20} MiB of one JSON value; "
                "unpack the file first, or write a row per line"
            )
    try:
        return data.decode(encoding.name)
    except UnicodeDecodeError as error:
        at, why = error.start, error.reason
        raise ValueError(
            f"{path}, byte {at}: not {error.encoding.upper()} ({why}); {NOT_UTF8}"
        ) from None


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _rows_in(value: Any, path: Path, report: ReadReport) -> list[tuple[str, Any]]:
    """The rows that one value holds, with their places. ValueError if it is not clear which."""
    if isinstance(value, list) and not _are_messages(value):
        return [(f"{path}, row {n}", row) for n, row in enumerate(value, 1)]
    if not isinstance(value, dict):
        return [(f"{path}, row 1", value)]
    if (rows := _columns(value)) is not None:
        report.hint(f"{path}: read as columns {quoted(rows[0] if rows else value)}")
        return [(f"{path}, row {n}", row) for n, row in enumerate(rows, 1)]
    if any(name in _COLUMNS for name in value):
        return [(f"{path}, row 1", value)]
    lists = [name for name, held in value.items() if _are_rows(held)]
    if len(lists) > 1 and not any(_are_messages(value[name]) for name in lists):
        raise ValueError(
            f"{path}: a JSON object with several lists of rows ({quoted(lists)}); write the one to "
            "read to a file of its own"
        )
    if len(lists) == 1 and not _are_messages(value[lists[0]]):
        report.hint(f"{path}: its rows are those of {lists[0]!r}")
        return [(f"{path}, {lists[0]} {n}", row) for n, row in enumerate(value[lists[0]], 1)]
    held = list(value.values())
    if len(held) > 1 and (all(isinstance(v, dict) for v in held) or all(map(_are_messages, held))):
        report.hint(f"{path}: its rows are the {len(held):,} fields of one object")
        return [(f"{path}, {name!r}", row) for name, row in value.items()]
    if not any(held):
        raise ValueError(
            f"{path}: a JSON object without rows ({quoted(value) or 'empty'}); {_UNIT}"
        )
    return [(f"{path}, row 1", value)]


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _are_messages(value: Any) -> bool:
    """Whether this is a conversation: a list of messages, which tell their speaker."""
    return _are_rows(value) and all(any(name in message for name in ROLE) for message in value)


def _columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table by columns: lists of equal length, mappings from the same row numbers,
    or (`orient="split"`) a list of names and lists of values; None for anything else."""
    names, data = value.get("columns"), value.get("data")
    if (
        isinstance(names, list)
        and isinstance(data, list)
        and len(set(map(str, names))) == len(names)
    ):
        if all(isinstance(row, list) and len(row) == len(names) for row in data):
            return [dict(zip(map(str, names), row, strict=True)) for row in data]
        return None
    held = list(value.values())
    if len(held) < 2:
        return None
    if all(isinstance(column, dict) for column in held):
        numbers = list(held[0])
        if (
            not numbers
            or not all(list(c) == numbers for c in held)
            or not all(map(str.isdigit, numbers))
        ):
            return None
        return [{name: column[n] for name, column in value.items()} for n in numbers]
    if not all(isinstance(column, list) for column in held) or len(set(map(len, held))) > 1:
        return None
    if not held[0] or any(isinstance(cell, dict | list) for column in held for cell in column):
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*held, strict=True)]

"""Rows of JSON files: one value per line, or all rows in one value.

That value may be a list of rows, an object with one such list, an object whose fields are the rows,
columns as pandas writes them, or a single row.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptsmith.data.columns import MESSAGES, PROMPT_AND_RESPONSE, ROLE, quoted
from gptsmith.data.decode import LINE_LIMIT, NOT_UTF8, open_text
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row, unicode_problem

_UNIT = "use a line per row, or a .json file with one list"
# Limits for a single value, in characters: 1 GiB, or, for a small compressed file, 16 MiB or this
# many times its size.
_WHOLE_LIMIT, _SMALL_LIMIT, _WHOLE_RATIO = 1 << 30, LINE_LIMIT, 50
_COLUMNS = {*MESSAGES, *(name for pair in PROMPT_AND_RESPONSE for name in pair)}
_SPACE = re.compile(r"\s*")


def json_rows(path: Path, report: ReadReport, encoding: str | None) -> Iterator[Row]:
    """The rows of a file. encoding: None: detect it.

    ValueError naming file and line of what cannot be read, unless `report` skips it.
    """
    values = _rows_of_file(path, encoding, report)
    if values is None:
        yield from _line_rows(path, encoding, report)
        return
    report.read[path] = len(values)
    for place, value in values:
        if row := _row(value, place, report):
            yield row


def _row(value: Any, place: str, report: ReadReport) -> Row | None:
    """A JSON value as a row; None if it is not one, which is reported."""
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
        what = error.msg.removesuffix(" at")  # some messages go on with the place
        return f"not JSON ({what} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON (nested too deeply)"
    return "not JSON (a number of too many digits)"


# --- a value on each line ------------------------------------------------------------------------


def _line_rows(path: Path, encoding: str | None, report: ReadReport) -> Iterator[Row]:
    number = blank = 0
    with open_text(path, encoding, report, "\n") as (raw, file):
        read_line = partial(file.readline, LINE_LIMIT)
        try:
            for number, line in enumerate(iter(read_line, ""), 1):
                if not number % 256:
                    report.reached(path, raw.tell())
                place = f"{path}:{number}"
                if line.isspace():
                    blank += 1
                elif len(line) >= LINE_LIMIT and _skip_rest_of_line(line, read_line):
                    problem = f"a line of more than {LINE_LIMIT >> 20} MiB; {_UNIT}"
                    report.reject("line that is too long", place, problem)
                elif unicode_problem(line):
                    report.reject("line that is not UTF-8", place, f"not UTF-8; {NOT_UTF8}")
                else:
                    try:
                        value = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        hint = f"; {_UNIT}" if number == 1 else ""
                        report.reject("malformed line", place, _reason(error) + hint)
                        continue
                    if row := _row(value, place, report):
                        yield row
        finally:
            report.read[path] = number - blank
            report.reached(path, raw.tell())


def _skip_rest_of_line(line: str, read_line: Callable[[], str]) -> bool:
    """Skip the rest of a line that was cut at LINE_LIMIT; returns whether there was more."""
    goes_on = False
    while line and not line.endswith("\n"):
        line = read_line()
        goes_on = goes_on or bool(line)
    return goes_on


# --- all rows in one value -----------------------------------------------------------------------


def _rows_of_file(
    path: Path, encoding: str | None, report: ReadReport
) -> list[tuple[str, Any]] | None:
    """Places and rows of a file, or None if it has one value per line."""
    with open_text(path, encoding, report, "\n") as (_, file):
        lines = iter(partial(file.readline, LINE_LIMIT), "")
        first = next((line for line in lines if line.strip()), "")
        has_more = any(line.strip() for line in lines)
    is_json = has_suffix(path, ".json", ".json.gz")
    try:
        values = [json.loads(first)]
        first.encode()  # fails if a byte of it was not of the encoding
    except (ValueError, RecursionError):
        begins = first.strip() in ("{", "[", "[{", "[[", "{[")  # printed over several lines
        if not begins and not is_json:
            return None
        values = _parse_values(path, encoding, report)
    else:
        if has_more or (isinstance(values[0], dict) and not is_json):
            return None
        rows = _rows_of_value(values[0], path, report)
        return None if [row for _, row in rows] == values else rows  # a line that is a row
    if len(values) == 1:
        return _rows_of_value(values[0], path, report)
    return [(f"{path}, row {n}", value) for n, value in enumerate(values, 1)] or None


def _parse_values(path: Path, encoding: str | None, report: ReadReport) -> list[Any]:
    """The consecutive JSON values of a file; empty if single lines are values, so that the file
    should be read line by line. ValueError naming the line of what is not JSON."""
    limit = min(_WHOLE_LIMIT, max(_SMALL_LIMIT, _WHOLE_RATIO * path.stat().st_size))
    with open_text(path, encoding, report) as (_, file):
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(
            f"{path}: more than {limit >> 20:,} MiB in one JSON value; write a row per line, for "
            "example with jq -c '.[]'"
        )
    if problem := unicode_problem(text):
        raise ValueError(f"{path}: {problem}; {NOT_UTF8}")
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


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _rows_of_value(value: Any, path: Path, report: ReadReport) -> list[tuple[str, Any]]:
    """The rows in a single value, with their places. ValueError if they are ambiguous."""

    def numbered(rows: list[Any], name: str = "row") -> list[tuple[str, Any]]:
        return [(f"{path}, {name} {n}", row) for n, row in enumerate(rows, 1)]

    if isinstance(value, list) and not _are_messages(value):
        return numbered(value)
    if not isinstance(value, dict):
        return numbered([value])
    if (rows := _rows_of_columns(value)) is not None:
        report.hint(f"{path}: read as columns {quoted(rows[0] if rows else value)}")
        return numbered(rows)
    if any(name in _COLUMNS for name in value):
        return numbered([value])
    lists = [name for name, held in value.items() if _are_rows(held)]
    if not any(_are_messages(value[name]) for name in lists):
        if len(lists) > 1:
            raise ValueError(
                f"{path}: a JSON object with several lists of rows ({quoted(lists)}); write the "
                "one to read to a file of its own"
            )
        if lists:
            report.hint(f"{path}: its rows are those of {lists[0]!r}")
            return numbered(value[lists[0]], lists[0])
    held = list(value.values())
    if len(held) > 1 and (all(isinstance(v, dict) for v in held) or all(map(_are_messages, held))):
        report.hint(f"{path}: its rows are the {len(held):,} fields of one object")
        return [(f"{path}, {name!r}", row) for name, row in value.items()]
    if not any(held):
        raise ValueError(
            f"{path}: a JSON object without rows ({quoted(value) or 'empty'}); {_UNIT}"
        )
    return numbered([value])


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _are_messages(value: Any) -> bool:
    """Whether this is a conversation: a list of messages, each with its speaker."""
    return _are_rows(value) and all(any(name in message for name in ROLE) for message in value)


def _rows_of_columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a column-oriented table as pandas writes it: lists of equal length, mappings with
    the same row numbers as keys, or (`orient="split"`) a list of names and lists of values. None
    for anything else."""
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
    if not held or not held[0]:
        return None
    if all(isinstance(column, dict) for column in held):
        numbers = list(held[0])
        if any(list(column) != numbers for column in held) or not all(map(str.isdigit, numbers)):
            return None
        return [{name: column[n] for name, column in value.items()} for n in numbers]
    if not all(isinstance(column, list) for column in held) or len(set(map(len, held))) > 1:
        return None
    if any(isinstance(cell, dict) for column in held for cell in column):
        return None  # rows, or messages
    return [dict(zip(value, cells, strict=True)) for cells in zip(*held, strict=True)]

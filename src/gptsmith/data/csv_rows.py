"""Rows of .csv and .tsv files; delimiter and encoding are detected unless they are given."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from gptsmith.data.decode import LINE_LIMIT, NOT_UTF8, open_text
from gptsmith.data.options import FileFormat
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row, check_unique, unicode_problem

_SAMPLE = 1 << 16  # characters
_RECORDS = 200
_JSON = re.compile(r"\s*(\[\s*[\[{]|\{\s*\")")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)  # Excel writes and hides it


def csv_rows(
    path: Path, report: ReadReport, header: Sequence[str] | None, file_format: FileFormat
) -> Iterator[Row]:
    """The rows of a file.

    header: names of the columns of a file without header line. file_format: encoding and delimiter,
    where they are given. ValueError naming the place of a malformed row, unless `report` skips it.
    """
    csv.field_size_limit(sys.maxsize)
    names, count = None if header is None else list(header), 0
    with open_text(path, file_format.encoding, report) as (raw, text):
        try:
            lines = _Lines(text)
            dialect = _dialect(path, lines, file_format, report)
            records = csv.reader(lines, **dialect)
            while True:
                place = f"{path}:{lines.start_record()}"
                record = _next_record(records, lines, dialect["delimiter"], names)
                if record is None:
                    return
                values, problem = record
                if not values and not problem:  # a blank line
                    continue
                if names is None:
                    names = _header(values, problem, place)
                    continue
                count += 1
                if not count % 256:
                    report.reached(path, raw.tell())
                kind = "malformed row"
                if not problem and len(values) != len(names):
                    problem = f"{len(values)} fields where the header has {len(names)}"
                elif unicode_problem("".join(values)):
                    kind, problem = "row that is not UTF-8", f"not UTF-8; {NOT_UTF8}"
                if problem:
                    report.reject(kind, place, problem)
                else:
                    yield Row(place, dict(zip(names, values, strict=True)))
        finally:
            report.read[path] = count
            report.reached(path, raw.tell())


def _next_record(
    records: Iterator[list[str]], lines: _Lines, delimiter: str, names: Sequence[str] | None
) -> tuple[list[str], str] | None:
    """The fields of the next record, or what is wrong with it; None at the end of the file."""
    values, problem = [], ""
    try:
        values = next(records)
    except StopIteration:
        return None
    except csv.Error as error:
        problem = f"cannot be read ({error})"
    swallowed = problem or _has_unclosed_quote(lines.record, delimiter, len(names or values))
    if len(lines.record) > 1 and swallowed:
        # An unclosed quote swallows the following rows into its field: read them again.
        last = lines.number
        lines.rewind()
        return [], f"a field in quotes begins here and has no end up to line {last}"
    return values, problem


def _header(names: list[str], problem: str, place: str) -> list[str]:
    """The names of a header line. ValueError if it cannot be one."""
    if problem:
        raise ValueError(f"{place}: the header line {problem}")
    if unicode_problem("".join(names)):
        raise ValueError(f"{place}: the header line is not UTF-8; {NOT_UTF8}")
    check_unique(names, place)
    return names


def _has_unclosed_quote(record: Sequence[str], delimiter: str, width: int) -> bool:
    """Whether a record of several lines is really several rows: every line by itself has as many
    fields as a row. In a genuine field of several lines, the first and the last line also contain
    the other fields of the row."""
    lines = [line for line in record if line.strip()]
    enough = (len(lines) - 1) * (width - 1) >= 6
    return enough and all(line.count(delimiter) == width - 1 for line in lines)


class _Lines:
    """The lines of a file for csv.reader; those of the current record can be read again.

    record   the lines of the current record
    number   the number of the last line
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.waiting: deque[str] = deque()
        self.record: list[str] = []
        self.number = self.size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._read()
        if not line:
            raise StopIteration
        self.number += 1
        self.record.append(line)
        self.size += len(line)
        if self.size >= LINE_LIMIT:
            while line and line[-1] not in "\r\n":
                line = self._read()
            raise csv.Error(f"longer than {LINE_LIMIT >> 20} MiB")
        return line

    def _read(self) -> str:
        """The next line, or a part of it where it is very long; "" at the end."""
        return self.waiting.popleft() if self.waiting else self.file.readline(LINE_LIMIT)

    def start_record(self) -> int:
        """Start a new record; returns the number of its first line."""
        self.record, self.size = [], 0
        return self.number + 1

    def rewind(self) -> None:
        """Go back to the second line of this record."""
        self.waiting.extendleft(reversed(self.record[1:]))
        self.number -= len(self.record) - 1

    def peek(self, size: int) -> str:
        """About `size` characters, in whole lines, without consuming them."""
        while size > 0 and (line := self.file.readline(LINE_LIMIT)):
            self.waiting.append(line)
            size -= len(line)
        return "".join(self.waiting)


# --- delimiter -----------------------------------------------------------------------------------


def _dialect(
    path: Path, lines: _Lines, file_format: FileFormat, report: ReadReport
) -> dict[str, Any]:
    """The arguments of csv.reader. A hint reports a delimiter that was detected."""
    is_tsv = has_suffix(path, ".tsv", ".tsv.gz")
    default = "\t" if is_tsv else ","
    sample, delimiter = lines.peek(_SAMPLE), file_format.delimiter
    if _JSON.match(sample):
        raise ValueError(
            f"{path} is JSON, not a .csv: name it .json, or .jsonl with a row per line"
        )
    if named := _SEPARATOR_LINE.match(sample):
        next(lines)
        sample, delimiter = sample[named.end() :], delimiter or named[1]
    delimiter = delimiter or detect_delimiter(sample, default)
    if delimiter not in (default, file_format.delimiter):
        report.hint(f"{path}: read with the delimiter {delimiter!r}")
    # A .tsv has no quoting (IANA text/tab-separated-values): " is an ordinary character.
    quoting = csv.QUOTE_NONE if is_tsv and delimiter == "\t" else csv.QUOTE_MINIMAL
    spaced = _consistency(sample, delimiter, spaced=True) > _consistency(sample, delimiter)
    return {
        "delimiter": delimiter, "quoting": quoting, "strict": quoting == csv.QUOTE_MINIMAL,
        "skipinitialspace": spaced and quoting == csv.QUOTE_MINIMAL,
    }  # fmt: skip


def detect_delimiter(sample: str, default: str) -> str:
    """The delimiter of a table that begins with `sample`: `default`, unless another one splits the
    first line, and more of the records into as many fields as that line."""
    best, found = _consistency(sample, default), default
    for delimiter in ",\t;|":
        share = _consistency(sample, delimiter) if delimiter != default else 0.0
        if share > max(best, 0.5):
            best, found = share, delimiter
    return found


def _consistency(sample: str, delimiter: str, spaced: bool = False) -> float:
    """The share of records with as many fields as the first one; 0 if that has only one.

    spaced: whether a space after a delimiter is not part of the field, so that a quote may follow.
    """
    lines = io.StringIO(sample, newline="")
    records = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced)
    widths = [len(record) for record in islice(records, _RECORDS) if record]
    return widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0.0

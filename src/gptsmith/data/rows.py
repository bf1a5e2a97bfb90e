"""Rows of tables: .json .jsonl .csv .tsv (each also .gz) .parquet .arrow, with their places.

Files are streamed, except those that are a single JSON value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptsmith.data import columnar
from gptsmith.data.csv_rows import csv_rows
from gptsmith.data.decode import open_text
from gptsmith.data.json_rows import json_rows
from gptsmith.data.options import FileFormat
from gptsmith.data.paths import FoundFiles, find_files, has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row
from gptsmith.recognize import TABLES, is_artifact, wrong_kind

SUFFIXES = (*TABLES, *(f"{suffix}.gz" for suffix in TABLES), *columnar.SUFFIXES)
_KINDS = ", ".join((*TABLES, *columnar.SUFFIXES))
_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*[{\["\]])')
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def read_rows(
    path: str | Path,
    report: ReadReport | None = None,
    *,
    header: Sequence[str] | None = None,
    file_format: FileFormat | None = None,
) -> Iterator[Row]:
    """The rows of a file, of all files in a folder, or of those that match a pattern, in order.

    A line of JSON that is a list becomes a row with a single column, `messages`.
    report: what to do with rows that cannot be read (default: ValueError).
    header: names of the columns where a .csv or .tsv has no header line.
    file_format: encoding and delimiter, if they are not to be detected.
    ValueError naming file and line of a row that cannot be read.
    """
    report = report or ReadReport()
    found = find_tables(path)
    found.count_empty(report)
    for file in found.files:
        yield from file_rows(file, report, header=header, file_format=file_format)


def find_tables(path: str | Path) -> FoundFiles:
    """The tables at a path, in a folder or of a pattern, sorted, and the empty ones separately.

    FileNotFoundError if there are none, ValueError for something other than a table.
    """
    path = Path(path)
    if is_artifact(path):
        raise wrong_kind(path, "a table or a folder of tables")
    found = find_files(path, lambda file: has_suffix(file, *SUFFIXES), f"file of {_KINDS}")
    for file in found.files:
        if not is_table(file):
            raise wrong_kind(file, f"a table ({_KINDS})")
    return found


def file_rows(
    path: Path,
    report: ReadReport,
    *,
    header: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    file_format: FileFormat | None = None,
) -> Iterator[Row]:
    """The rows of one file. columns: those to read (Parquet and Arrow only)."""
    file_format = file_format or FileFormat()
    if path.stat().st_size == 0:
        report.reject("empty file", str(path), "the file is empty")
    elif has_suffix(path, *columnar.SUFFIXES):
        yield from _columnar_rows(path, report, columns)
    elif has_suffix(path, *CSV):
        yield from csv_rows(path, report, header, file_format)
    else:
        yield from json_rows(path, report, file_format.encoding)


def is_table(path: Path) -> bool:
    """Whether a file is named as a table, or holds JSON under another name."""
    if has_suffix(path, *SUFFIXES):
        return True
    try:
        with open_text(path, None, ReadReport()) as (_, file):
            return _JSON.match(file.read(1 << 12)) is not None
    except ValueError:
        return False


def _columnar_rows(path: Path, report: ReadReport, columns: Sequence[str] | None) -> Iterator[Row]:
    names = columnar.read_schema(path).names
    number = 0
    try:
        for batch in columnar.read_batches(path, columns or names, report):
            try:
                values = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, row {number + 1} or later: {error}") from None
            for row in values:
                number += 1
                yield Row(f"{path}, row {number}", row)
    finally:
        report.read[path] = number

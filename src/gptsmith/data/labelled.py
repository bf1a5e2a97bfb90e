"""Labelled texts from tables, files of lines and folders; the label is found if it is obvious."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.data.columns import LABEL, TEXT, choose_column, unclear_column, usual_columns
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import SUFFIXES, Row, read_rows, unicode_problem


class LabelledText(NamedTuple):
    """A text and its label. place: where it is, for errors."""

    text: str
    label: str
    place: str


def read_labelled(
    path: Path, text_column: str | None, label_column: str | None, report: ReadReport
) -> list[LabelledText]:
    """The rows that have a text and a label.

    ValueError naming the place for columns that are not obvious, for bad rows unless `report`
    skips them, and if there are no rows.
    """
    rows = []
    for place, text, label in _pairs(path, text_column, label_column, report):
        row = LabelledText(_text(text), _label(label), place)
        if problem := _problem(row):
            report.reject(problem, place, problem)
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no row with a text and a label")
    return rows


def read_texts(path: Path, text_column: str | None) -> Iterator[tuple[str, Row]]:
    """Texts without labels, each with its row: rows of a table, or lines of another file.

    ValueError naming the place for a column that is not obvious and for a row without text.
    """
    if _is_lines(path):
        lines = enumerate(_decoded(path).split("\n"), 1)
        rows = iter([Row(f"{path}:{i}", {"text": line}) for i, line in lines if line.strip()])
    else:
        rows = read_rows(path)
    column = text_column
    for row in rows:
        names = list(row.values)
        column = column or choose_column(names, None, TEXT, row.place)
        column = column or (names[0] if len(names) == 1 else None)
        if column is None:
            raise unclear_column("text", names, row.place)
        text = _text(row.values.get(column))
        if problem := _problem(LabelledText(text, "any", row.place)):
            raise ValueError(f"{row.place}: {problem} (column {column!r})")
        yield text, row


Pair = tuple[str, Any, Any]  # place, text, label


def _pairs(
    path: Path, text_column: str | None, label_column: str | None, report: ReadReport
) -> Iterator[Pair]:
    if folders := _class_folders(path):
        for folder in folders:
            for file in sorted(folder.glob("*.txt")):
                yield str(file), _decoded(file), folder.name
    elif _is_lines(path):
        yield from _line_pairs(path)
    else:
        yield from _table_pairs(path, text_column, label_column, report)


def _table_pairs(
    path: Path, text_column: str | None, label_column: str | None, report: ReadReport
) -> Iterator[Pair]:
    rows = list(read_rows(path, report))
    if not rows:
        return
    names = list(rows[0].values)
    configured = text_column or label_column
    if len(names) == 2 and not configured and not usual_columns(names, TEXT + LABEL):
        # Perhaps a table without header line: then a "name" of the label column occurs in its rows.
        columns = [[name, *(row.values.get(name) for row in rows)] for name in names]
        at = _label_column(columns)
        if at is not None and names[at] in columns[at][1:]:
            report.hint(f"{path}: no header line; column {at + 1} of 2 is the label")
            for row in read_rows(path, report, header=("0", "1")):
                yield row.place, row.values[str(1 - at)], row.values[str(at)]
            return
    text, label = _text_and_label(names, rows, text_column, label_column)
    for row in rows:
        yield row.place, row.values.get(text), row.values.get(label)


def _text_and_label(
    names: list[str], rows: Sequence[Row], text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Names of the two columns."""
    place = rows[0].place
    text = choose_column(names, text_column, TEXT, place)
    label = choose_column(names, label_column, LABEL, place)
    if len(names) == 2 and (text is None) != (label is None):  # the other one, if it can be
        other = next(name for name in names if name not in (text, label))
        columns = [[row.values.get(name) for row in rows] for name in (text or other, other)]
        if label is not None:
            text = other
        elif _label_column(columns) == 1:
            label = other
    if text is None or label is None:
        raise unclear_column("text" if text is None else "label", names, place)
    if text == label:
        raise ValueError(f"{place}: column {text!r} cannot be text and label at once")
    return text, label


def _line_pairs(path: Path) -> Iterator[Pair]:
    """Lines `label<TAB>text` or `text<TAB>label`, where labels are the values that repeat; or lines
    `0 text` or `__label__name text`."""
    lines = [(i, line) for i, line in enumerate(_decoded(path).split("\n"), 1) if line.strip()]
    first = lines[0][1] if lines else ""
    has_tab = "\t" in first
    pairs = [(i, line.strip().split("\t" if has_tab else None, 1)) for i, line in lines]
    complete = [parts for _, parts in pairs if len(parts) == 2]
    at = _label_column([[parts[0] for parts in complete], [parts[1] for parts in complete]])
    if at is None or not (has_tab or re.match(r"(\d+|__label__\S+) ", first)):
        raise ValueError(
            f"{path}:1: which part of a line is the label? Write label, TAB, text, with labels "
            "that repeat, or a .csv with the header line text,label"
        )
    for i, parts in pairs:
        label_only = len(parts) == 1
        text = None if label_only else parts[1 - at]
        yield f"{path}:{i}", text, parts[0] if label_only else parts[at]


def _is_lines(path: Path) -> bool:
    """Whether this is a file of lines rather than a table."""
    return path.is_file() and not has_suffix(path, *SUFFIXES)


def _class_folders(path: Path) -> list[Path]:
    """The sub-folders with .txt files, sorted; at least two, else none."""
    if not path.is_dir():
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and next(p.glob("*.txt"), None))
    return folders if len(folders) > 1 else []


def _decoded(path: Path) -> str:
    """The file's text; bytes that are not UTF-8 become lone surrogates, which _problem reports."""
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def _label_column(columns: Sequence[Sequence[Any]]) -> int | None:
    """Which of two columns holds labels: the one with fewer distinct values, which must repeat."""
    distinct = [len({str(value) for value in column}) for column in columns]
    at = 0 if distinct[0] < distinct[1] else 1
    repeats = 2 * distinct[at] <= len(columns[at])
    return at if distinct[0] != distinct[1] and repeats else None


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _label(value: Any) -> str:
    """A label as text; "" if it is missing or of an unsuitable type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # pandas turns integers with missing values into floats
        return "" if value != value else str(int(value) if value.is_integer() else value)
    return str(value).strip() if isinstance(value, str | int) else ""


def _problem(row: LabelledText) -> str:
    if not row.text:
        return "the text is missing"
    if not row.label:
        return "the label is missing"
    return "not UTF-8" if unicode_problem(row.text + row.label) else ""

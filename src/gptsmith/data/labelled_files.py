"""Texts with labels as they lie in files: tables, lines, folders. What is meant must be obvious."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.data.columns import listed
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import SUFFIXES, Row, read_rows

# Names under which data sets keep these columns; the first of each wins over the others.
TEXT_COLUMNS = ("text", "sentence", "review", "message", "sms", "content", "v2")
LABEL_COLUMNS = ("label", "class", "target", "sentiment", "category", "v1")


class LabelledText(NamedTuple):
    text: str
    label: str
    place: str


@dataclass
class LabelledFiles:
    """Reads sources alike. `report` says what happens to bad rows, `notes` what was understood."""

    text_column: str | None
    label_column: str | None
    report: ReadReport
    notes: list[str] = field(default_factory=list)

    def read(self, path: Path) -> list[LabelledText]:
        """The rows that have a text and a label.

        ValueError naming the place: columns that are not obvious, bad rows unless the report skips
        them, no row at all.
        """
        found = []
        for place, text, label in self._pairs(path):
            row = LabelledText(_text(text), _label(label), place)
            if wrong := _wrong(row):
                self.report.reject(wrong, place, wrong)
            else:
                found.append(row)
        if not found:
            raise ValueError(f"{path}: no row with a text and a label")
        return found

    def _pairs(self, path: Path) -> Iterator[tuple[str, Any, Any]]:
        """Place, text and label of each row."""
        if folders := class_folders(path):
            for folder in folders:
                for file in sorted(folder.glob("*.txt")):
                    yield str(file), _decoded(file), folder.name
        elif path.is_file() and not path.name.lower().endswith(SUFFIXES):
            yield from _line_pairs(path)
        else:
            yield from self._table_pairs(path)

    def _table_pairs(self, path: Path) -> Iterator[tuple[str, Any, Any]]:
        rows = list(read_rows(path, self.report))
        names = list(rows[0].values) if rows else []
        asked = self.text_column or self.label_column
        if len(names) == 2 and not asked and not _known(names, TEXT_COLUMNS + LABEL_COLUMNS):
            # A header line would not repeat in the rows: this may be a table without one.
            columns = [[name, *(row.values.get(name) for row in rows)] for name in names]
            at = _label_column(columns)
            if at is not None and names[at] in columns[at][1:]:
                self.notes.append(f"{path}: no header line; column {at + 1} of 2 is the label")
                rows = list(read_rows(path, self.report, header=("1", "2")))
                yield from _values(rows, str(2 - at), str(1 + at))
                return
        yield from _values(rows, *self._columns(names, rows)) if rows else ()

    def _columns(self, names: list[str], rows: Sequence[Row]) -> tuple[str, str]:
        """Names of the text and the label column."""
        place = rows[0].place
        text = _column(names, self.text_column, TEXT_COLUMNS, place)
        label = _column(names, self.label_column, LABEL_COLUMNS, place)
        if len(names) == 2 and (text is None) != (label is None):  # the other one, if it can be
            other = next(name for name in names if name not in (text, label))
            columns = [[row.values.get(name) for row in rows] for name in (text or other, other)]
            if label is not None:
                text = other
            elif _label_column(columns) == 1:
                label = other
        if text is None or label is None:
            raise _which("text" if text is None else "label", names, place)
        if text == label:
            raise ValueError(f"{place}: column {text!r} cannot be text and label at once")
        return text, label


def read_texts(path: Path, text_column: str | None) -> Iterator[tuple[str, Row]]:
    """Texts that nobody labelled, each with its row: of a table, or the lines of another file.

    ValueError naming the place: a column that is not obvious, a row without text.
    """
    if path.is_file() and not path.name.lower().endswith(SUFFIXES):
        lines = enumerate(_decoded(path).split("\n"), 1)
        rows = iter([Row(f"{path}:{i}", {"text": line}) for i, line in lines if line.strip()])
    else:
        rows = read_rows(path)
    column = text_column
    for row in rows:
        names = list(row.values)
        column = column or _column(names, None, TEXT_COLUMNS, row.place)
        column = column or (names[0] if len(names) == 1 else None)
        if column is None:
            raise _which("text", names, row.place)
        text = _text(row.values.get(column))
        if wrong := _wrong(LabelledText(text, "any", row.place)):
            raise ValueError(f"{row.place}: {wrong} (column {column!r})")
        yield text, row


def class_folders(path: Path) -> list[Path]:
    """The sub-folders with .txt files, in order: two at least, else none."""
    if not path.is_dir():
        return []
    found = sorted(p for p in path.iterdir() if p.is_dir() and next(p.glob("*.txt"), None))
    return found if len(found) > 1 else []


def _values(rows: Sequence[Row], text: str, label: str) -> Iterator[tuple[str, Any, Any]]:
    yield from ((row.place, row.values.get(text), row.values.get(label)) for row in rows)


def _line_pairs(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Lines `label<TAB>text` or `text<TAB>label`, which the repetition of the labels tells; or
    `0 text` and `__label__name text`."""
    lines = [(i, line) for i, line in enumerate(_decoded(path).split("\n"), 1) if line.strip()]
    first = lines[0][1] if lines else ""
    tab = "\t" in first
    pairs = [(i, line.strip().split("\t" if tab else None, 1)) for i, line in lines]
    whole = [parts for _, parts in pairs if len(parts) == 2]
    at = _label_column([[parts[0] for parts in whole], [parts[1] for parts in whole]])
    if at is None or not (tab or re.match(r"(\d+|__label__\S+) ", first)):
        raise ValueError(
            f"{path}:1: which part of a line is the label? Write label, TAB, text, with labels "
            "that repeat, or a .csv with the header line text,label"
        )
    for i, parts in pairs:
        alone = len(parts) == 1
        yield f"{path}:{i}", None if alone else parts[1 - at], parts[0] if alone else parts[at]


def _decoded(path: Path) -> str:
    """The file's text; bytes that are no UTF-8 become lone surrogates, which _wrong reports."""
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def _known(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of `names` that are among `wanted`; the first of `wanted` alone, if it is there."""
    found = [name for name in names if name.strip().lower() in wanted]
    first = [name for name in found if name.strip().lower() == wanted[0]]
    return first or found


def _column(
    names: Sequence[str], asked: str | None, wanted: Sequence[str], place: str
) -> str | None:
    """The column asked for, or the only one with a known name."""
    if asked is not None:
        if asked not in names:
            raise ValueError(f"{place}: no column {asked!r}; there are {listed(names)}")
        return asked
    found = _known(names, wanted)
    return found[0] if len(found) == 1 else None


def _which(what: str, names: Sequence[str], place: str) -> ValueError:
    shown = listed(name[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return ValueError(
        f"{place}: which column holds the {what}? There are {shown}; say --{what}-column NAME"
    )


def _label_column(columns: Sequence[Sequence[Any]]) -> int | None:
    """Which of two columns holds labels: they repeat, and there are fewer of them than texts."""
    kinds = [len({str(value) for value in column}) for column in columns]
    at = 0 if kinds[0] < kinds[1] else 1
    return at if kinds[0] != kinds[1] and 2 * kinds[at] <= len(columns[at]) else None


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _label(value: Any) -> str:
    """A label as text; "" for what is missing or can be none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # a column of integers with gaps holds floats
        return "" if value != value else str(int(value) if value.is_integer() else value)
    return str(value).strip() if isinstance(value, str | int) else ""


def _wrong(row: LabelledText) -> str:
    if not row.text:
        return "the text is missing"
    if not row.label:
        return "the label is missing"
    try:
        f"{row.text}{row.label}".encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""

"""Read labelled texts from tables, text files and folders; an obvious label is detected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.data.cells import InvalidRowError, cell_text
from gptsmith.data.columns import (
    LABEL,
    TEXT,
    choose_column,
    choose_text_column,
    known_columns,
    unclear_column,
)
from gptsmith.data.csv_rows import csv_rows
from gptsmith.data.options import FileFormat, LabelledFiles
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row, unicode_problem
from gptsmith.data.rows import is_table, read_rows
from gptsmith.data.text_files import read_text
from gptsmith.recognize import is_artifact, wrong_kind


class LabelledText(NamedTuple):
    """A text and its label. place: where it is, for errors."""

    text: str
    label: str
    place: str


def read_labelled(path: Path, files: LabelledFiles, report: ReadReport) -> list[LabelledText]:
    """The rows that have a text and a label.

    ValueError naming the place for columns that are not obvious, for bad rows unless `report`
    skips them, and if there are no rows.
    """
    rows = []
    for place, text, label in _pairs(path, files, report):
        try:
            row = LabelledText(_text(text), _label(label), place)
        except InvalidRowError as error:
            report.reject(error.kind, place, str(error))
            continue
        if problem := _problem(row):
            report.reject(problem, place, problem)
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no row with a text and a label")
    if name := _looks_like_no_label({row.label for row in rows}):
        report.hint(
            f"{path}: label {name} is a class of its own; if it marks texts without a label, "
            "remove them"
        )
    return rows


def read_texts(
    path: Path, text_column: str | None, report: ReadReport, file_format: FileFormat
) -> Iterator[tuple[str, Row]]:
    """Texts without labels, each with its row: rows of a table, or lines of another file.

    ValueError naming the place for a column that is not obvious and for a row without text.
    """
    if _is_lines(path):
        lines = enumerate(read_text(path, file_format.encoding, report).split("\n"), 1)
        rows = iter([Row(f"{path}:{i}", {"text": line}) for i, line in lines if line.strip()])
    else:
        rows = read_rows(path, report, file_format=file_format)
    column = ""
    for row in rows:
        names = list(row.values)
        column = column or choose_text_column(names, text_column, names, row.place)
        try:
            text = _text(row.values.get(column))
        except InvalidRowError as error:
            raise ValueError(f"{row.place}: {error} (column {column!r})") from None
        if problem := _problem(LabelledText(text, "any", row.place)):
            raise ValueError(f"{row.place}: {problem} (column {column!r})")
        yield text, row


Pair = tuple[str, Any, Any]  # place, text, label


def _pairs(path: Path, files: LabelledFiles, report: ReadReport) -> Iterator[Pair]:
    if is_artifact(path):
        raise wrong_kind(path, "a set of labelled texts")
    if folders := _class_folders(path):
        for folder in folders:
            for file in sorted(folder.glob("*.txt")):
                report.read[file] = 1
                yield str(file), read_text(file, files.encoding, report), folder.name
    elif _is_lines(path):
        yield from _line_pairs(path, files, report)
    else:
        yield from _table_pairs(path, files, report)


def _table_pairs(path: Path, files: LabelledFiles, report: ReadReport) -> Iterator[Pair]:
    rows = list(read_rows(path, report, file_format=files))
    if not rows:
        return
    names = list(rows[0].values)
    configured = files.text_column or files.label_column
    if len(names) == 2 and not configured and not known_columns(names, TEXT + LABEL):
        # Perhaps a table without header line: then a "name" of the label column occurs in its rows.
        columns = [[name, *(row.values.get(name) for row in rows)] for name in names]
        at = _label_column(columns)
        if at is not None and names[at] in columns[at][1:]:
            report.hint(f"{path}: no header line; column {at + 1} of 2 is the label")
            for row in read_rows(path, report, header=("0", "1"), file_format=files):
                yield row.place, row.values[str(1 - at)], row.values[str(at)]
            return
    yield from _column_pairs(rows, files, report)


_ANSWER = "answer"  # of the annotator who was shown text and label, in Prodigy


def _column_pairs(rows: Sequence[Row], files: LabelledFiles, report: ReadReport) -> Iterator[Pair]:
    if rows:
        text, label = _text_and_label(list(rows[0].values), rows, files)
        for row in rows:
            answer = "" if label == _ANSWER else row.values.get(_ANSWER)
            if answer in ("reject", "ignore"):
                report.skipped.add("rejected or ignored by the annotator", row.place)
            else:
                yield row.place, row.values.get(text), row.values.get(label)


def _text_and_label(names: list[str], rows: Sequence[Row], files: LabelledFiles) -> tuple[str, str]:
    """Names of the two columns."""
    place = rows[0].place
    text = choose_column(names, files.text_column, TEXT, place)
    label = choose_column(names, files.label_column, LABEL, place)
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


# --- lines ---------------------------------------------------------------------------------------

# Where to split a line: at the first delimiter, after a leading label (0), or at the last one,
# before a trailing label (1).
_LAYOUTS = [(delimiter, side) for delimiter in "|;,: " for side in (0, 1)]
_LAYOUTS.remove((":", 1))
_NAMES = {"\t": "tab", " ": "space", ",": "comma"}
# +1, 0, 4.5, __label__spam, DESC:manner: recognized as labels by their form, whatever their number
_LABEL_FORM = re.compile(r"[-+]?\d+(\.\d+)?|__label__\S+|[^\W\d_]\w*:\S*\w")
# The last "word" of many texts (tokenized ones end in " ." or " ?"), and never a label.
_PUNCTUATION = re.compile(r"[.,:;!?…'\"”’)\]}]+")


def _line_pairs(path: Path, files: LabelledFiles, report: ReadReport) -> Iterator[Pair]:
    """Lines of a label and a text, in either order.

    They are separated by a tab, |, ;, comma or colon, or the label is the first or last word. The
    labels must be obvious: they repeat, and they are few or all have a typical form. Of several
    possible layouts, those with labels of a typical form take precedence, then those that do not
    split at a space, then the one with the shortest labels.
    """
    text = read_text(path, files.encoding, report)
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    report.read[path] = len(lines)
    if lines and (delimiter := _header_delimiter(lines[0][1])):
        file_format = FileFormat(encoding=files.encoding, delimiter=delimiter)
        yield from _column_pairs(list(csv_rows(path, report, None, file_format)), files, report)
        return
    delimiter = files.delimiter or "\t"
    layouts = _label_layouts(lines, [(delimiter, 0), (delimiter, 1)])
    if files.delimiter is None:
        layouts = layouts or _label_layouts(lines, _LAYOUTS)
    if not layouts:
        raise ValueError(
            f"{path}:1: which part of a line is the label? Write label, TAB, text, with labels "
            "that repeat, or a .csv with the header line text,label"
        )
    _, delimiter, side, pairs = _best_layout(layouts)
    if delimiter != "\t":
        where = "after the last" if side else "before the first"
        report.hint(f"{path}: the label is the part {where} {_NAMES.get(delimiter, delimiter)}")
    for (i, line), pair in zip(lines, pairs, strict=True):
        if pair and pair[1].startswith("__label__") and "__label__" in pair[0]:
            report.reject("several labels", f"{path}:{i}", "several labels: a text has one here")
        else:
            yield f"{path}:{i}", *(pair or (None, line))


_TextAndLabel = tuple[str, str] | None  # text and label


class _Layout(NamedTuple):
    """A way to split lines into texts and labels.

    rank: whether the labels have no typical form, the length of the longest, and their number.
    side: see _split_line.
    """

    rank: tuple[bool, int, int]
    delimiter: str
    side: int
    pairs: list[_TextAndLabel]


def _label_layouts(
    lines: Sequence[tuple[int, str]], divisions: Sequence[tuple[str, int]]
) -> list[_Layout]:
    """The possible layouts; none if both sides of a tab could equally well be the labels."""
    layouts: list[_Layout] = []
    for delimiter, side in divisions:
        pairs = [_split_line(line, delimiter, side) for _, line in lines]
        labels = Counter(pair[1] for pair in pairs if pair)
        if _are_labels(labels, len(lines), delimiter):
            rank = (not _are_of_form(labels), max(map(len, labels)), len(labels))
            if delimiter == "\t":
                rank = (False, 0, len(labels))
                if any(layout.rank == rank for layout in layouts):
                    return []
            layouts.append(_Layout(rank, delimiter, side, pairs))
    return layouts


def _best_layout(layouts: Sequence[_Layout]) -> _Layout:
    """The layout with the best rank: of those with labels of a typical form, else of those that do
    not split at a space. A layout that only strips constant words from its labels is preferred."""
    formed = [layout for layout in layouts if not layout.rank[0]]
    divided = [layout for layout in layouts if layout.delimiter != " "]
    best = min(formed or divided or layouts, key=lambda layout: layout.rank)
    return next((layout for layout in layouts if _has_shorter_labels(layout, best)), best)


def _has_shorter_labels(layout: _Layout, other: _Layout) -> bool:
    """Whether the other layout's labels are those of this one plus words that are always equal."""
    rests = set()
    for mine, theirs in zip(layout.pairs, other.pairs, strict=True):
        if mine and theirs:
            part, label = mine[1], theirs[1]
            if not (label.endswith(part) if layout.side else label.startswith(part)):
                return False
            rests.add(label.removesuffix(part) if layout.side else label.removeprefix(part))
    return layout.side == other.side and len(rests) == 1 and rests != {""}


def _split_line(line: str, delimiter: str, side: int) -> _TextAndLabel:
    """Text and label of a line; None without the delimiter. side: 0 if the label comes first."""
    separator = None if delimiter == " " else delimiter
    parts = line.rsplit(separator, 1) if side else line.split(separator, 1)
    if len(parts) < 2:
        return None
    junction = f"{delimiter} "  # which may be several characters: label ||| text
    left, right = parts[0].rstrip(junction), parts[1].lstrip(junction)
    if delimiter in "|;,":  # as in a .csv
        left, right = (
            part[1:-1].replace('""', '"') if re.fullmatch(r'(?s)".*"', part) else part
            for part in (left, right)
        )
    text, label = (left, right) if side else (right, left)
    return text, label if delimiter == "\t" else label.removesuffix(":")


def _are_labels(counts: Counter[str], lines: int, delimiter: str) -> bool:
    """Whether these can be the labels of a file with this many lines."""
    total = counts.total()
    if not counts or total * 10 < lines * 9 or 2 * len(counts) > total:
        return False
    if delimiter == " " and any(map(_PUNCTUATION.fullmatch, counts)):
        return False
    by_form = len(counts) > 1 and _are_of_form(counts)
    few = 1 < len(counts) <= 20 and min(counts.values()) > 1 and max(map(len, counts)) <= 40
    return delimiter == "\t" or by_form or few


def _are_of_form(labels: Iterable[str]) -> bool:
    """Whether all of them are of a form in which labels are written."""
    return all(map(_LABEL_FORM.fullmatch, labels))


def _is_lines(path: Path) -> bool:
    """Whether this is a file of lines rather than a table."""
    return path.is_file() and not is_table(path)


def _header_delimiter(line: str) -> str:
    """The delimiter of a line that names a column of texts and one of labels; "" for others."""
    for delimiter in "\t,;|":
        names = [name.strip(" \"'") for name in line.split(delimiter)]
        if known_columns(names, TEXT) and known_columns(names, LABEL):
            return delimiter
    return ""


def _class_folders(path: Path) -> list[Path]:
    """The sub-folders with .txt files, sorted; at least two, else none."""
    if not path.is_dir():
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and next(p.glob("*.txt"), None))
    return folders if len(folders) > 1 else []


def _label_column(columns: Sequence[Sequence[Any]]) -> int | None:
    """Which of two columns holds labels: the one with fewer distinct values, which must repeat."""
    distinct = [len({str(value) for value in column}) for column in columns]
    at = 0 if distinct[0] < distinct[1] else 1
    repeats = 2 * distinct[at] <= len(columns[at])
    return at if distinct[0] != distinct[1] and repeats else None


def _text(value: Any) -> str:
    return cell_text(value, "the text").strip()


def _label(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:  # doccano
        value = value[0]
    if isinstance(value, list) and value:
        raise InvalidRowError("several labels", "several labels: a text has one here")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns integers with missing values into floats
    return cell_text(value, "the label").strip()


def _looks_like_no_label(labels: set[str]) -> str:
    """The label by which data sets of numbered classes mark unlabelled texts, if it is among these;
    "" if not, or if it belongs to a scale such as -1, 1."""
    numbers = {label for label in labels if re.fullmatch(r"\d+(\.0)?", label)}
    others = labels - numbers
    is_mark = len(numbers) > 1 and others <= {"-1", "-1.0", "-100", "-100.0"}
    return min(others, default="") if is_mark else ""


def _problem(row: LabelledText) -> str:
    if not row.text:
        return "the text is missing"
    if not row.label:
        return "the label is missing"
    return "not UTF-8" if unicode_problem(row.text + row.label) else ""

"""Locate the files of evaluation tasks, and read the columns of their rows with checks.

The readers are imported inside functions, because --help lists the tasks and must not load them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith import files

if TYPE_CHECKING:
    from gptsmith.data.options import FileFormat
    from gptsmith.data.report import ReadReport
    from gptsmith.data.row import Row


def find(task: str, where: Path | None, names: Sequence[str]) -> Path | None:
    """The file or folder of a task: the first of `names`, which may be patterns, in the folder
    `where`. Default: $GPTSMITH_DATA, and None if it has none of them: they are on the Hub."""
    folder = where or os.environ.get("GPTSMITH_DATA")
    paths = (path for name in names if folder for path in sorted(Path(folder).glob(name)))
    found = next(paths, None)
    if found is None and where is not None:
        raise FileNotFoundError(f"{where}: {task} is not here as {' or '.join(names)}")
    return found


def hub_rows(hub: tuple[str, str | None, str], local: str) -> Iterator[Row]:
    """The rows of a data set (name, configuration, split) on the Hugging Face Hub, as a stream.

    local: the file to provide instead, for the error message when the Hub cannot be reached.
    """
    from gptsmith.data import hub as data_hub

    remedy = f"without network, put {local} into a folder and set GPTSMITH_DATA to it"
    data_set = data_hub.HubName(*hub)
    return data_hub.hub_rows(data_set, data_hub.hub_revision(data_set, remedy))


def question_rows(
    path: str | Path, report: ReadReport | None = None, form: FileFormat | None = None
) -> Iterator[Row]:
    """The rows of a question file, with labels from a separate file next to it, if there is one."""
    from gptsmith.data.rows import read_rows

    path = Path(path)
    stem = path.name.partition(".")[0]
    names = (f"{stem}-labels.lst", f"{stem}_labels.lst", f"{stem}.lst", "labels.lst")
    found = (path.with_name(name) for name in names)
    labels = None if path.is_dir() else next((file for file in found if file.is_file()), None)
    if labels is None:
        yield from read_rows(path, report, file_format=form)
        return
    rows = list(read_rows(path, report, file_format=form))
    if any("label" in row.values for row in rows):
        yield from rows
        return
    # As in the original releases of PIQA and Social IQA: a line per question.
    lines = files.read_text(labels).split()
    if len(rows) != len(lines):
        count = f"{path} has {len(rows):,} questions, {labels} {len(lines):,} labels"
        raise ValueError(f"{count}: give the two files of one split")
    for row, line in zip(rows, lines, strict=True):
        yield row._replace(values=row.values | {"label": line})


def text(row: Row, name: str, values: Mapping[str, Any] | None = None) -> str:
    """The text in column `name` (of `values`, if they are nested). ValueError if it is not text."""
    from gptsmith.data.columns import quoted
    from gptsmith.data.row import check_unicode

    values = row.values if values is None else values
    if name not in values:
        raise ValueError(f"{row.place}: no column {name!r}; it has {quoted(values)}")
    value = values[name]
    if not isinstance(value, str):
        raise ValueError(f"{row.place}: {name!r} is {value!r:.40}, not text")
    check_unicode(row, name, value)
    return value


def texts(row: Row, name: str, values: Mapping[str, Any] | None = None) -> list[str]:
    """The list of two or more texts in column `name`; ValueError for anything else."""
    values = row.values if values is None else values
    value = values.get(name)
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{row.place}: {name!r} is {value!r:.40}, not a list of two or more texts")
    return [text(row, name, {name: item}) for item in value]


def label(row: Row, name: str) -> int:
    """The index of the correct choice in column `name`; some files spell it as text."""
    value = row.values.get(name)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,3}", str(value)):
        raise ValueError(
            f"{row.place}: {name!r} is {value!r:.40}, not the number of a choice; a test set"
            " without answers cannot be scored: use the validation set, with its -labels.lst beside"
            " it if it has one"
        )
    return int(str(value))

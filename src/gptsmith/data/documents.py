"""Documents, which every source of text yields, and reading them from the rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gptsmith.data import columnar, columns
from gptsmith.data.options import ReadOptions
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row, unicode_problem
from gptsmith.data.rows import CSV, file_rows

if TYPE_CHECKING:
    from gptsmith.data.token_files import TokenFiles
    from gptsmith.data.token_tables import TokenTables

Chunk = str | np.ndarray


class Document(NamedTuple):
    """One document: text, in chunks that can be encoded separately, or token ids.

    place      where it comes from, for messages: "notes.txt", "chat.jsonl:17"
    chunks     str, or arrays of token ids; can be iterated more than once
    delimited  whether document tokens are put around it (not for parts of documents and streams)
    """

    place: str
    chunks: Iterable[Chunk]
    delimited: bool = True


@dataclass(frozen=True)
class Source:
    """An opened source of documents.

    used           what was opened, as the manifest records it
    documents      reads the documents from the beginning
    files          its local files, in reading order
    validation     the source's own validation documents, if it has any
    first_shard    whether its first shard of tokens is for validation
    token_ids      the ids, if the files hold token ids instead of text
    read           reads the documents of some of `files`, if each file has documents of its own
    requested      the source as the user wrote it
    unavailable    why alternatives to the left of it were not used
    """

    used: str
    documents: Callable[[], Iterator[Document]]
    files: tuple[Path, ...] = ()
    validation: Source | None = None
    first_shard: bool = False
    token_ids: TokenTables | TokenFiles | None = None
    read: Callable[[Sequence[Path]], Iterator[Document]] | None = None
    requested: str = ""
    unavailable: tuple[str, ...] = ()


def document(place: str, text: str, report: ReadReport) -> Iterator[Document]:
    """Yield the text as a document, unless it is blank or not Unicode."""
    if problem := unicode_problem(text):
        report.reject("row that is not UTF-8", place, problem)
    elif text.strip():
        yield Document(place, (text,))
    else:
        report.reject("empty document", place, "an empty document")


def table_documents(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """One document per row of a table, from its text column."""
    if has_suffix(path, *columnar.SUFFIXES):
        schema = columnar.read_schema(path)
        texts = [field.name for field in schema if columnar.is_text(field.type)]
        column = columns.choose_text_column(schema.names, options.text_column, texts, str(path))
        if column not in texts:
            kind = schema.field(column).type
            raise ValueError(f"{path}: column {column!r} holds {kind}, not text")
        return _texts(
            file_rows(path, report, columns=[column], file_format=options), column, report
        )
    # every value of a .csv is a string: a single column of strings need not be the text
    typed = not has_suffix(path, *CSV)
    return row_documents(file_rows(path, report, file_format=options), options, report, typed=typed)


def row_documents(
    rows: Iterator[Row], options: ReadOptions, report: ReadReport, *, typed: bool = True
) -> Iterator[Document]:
    """One document per row. typed: values have types, as in JSON; in a .csv all are strings."""
    first = next(rows, None)
    if first is None:
        return
    _check_no_ids(first, options)
    texts = [name for name, value in first.values.items() if typed and isinstance(value, str)]
    try:
        column = columns.choose_text_column(
            list(first.values), options.text_column, texts, first.place
        )
    except ValueError as error:
        hint = "" if typed else " (the first line names the columns)"
        raise ValueError(f"{error}{hint}") from None
    yield from _texts(chain([first], rows), column, report)


def _check_no_ids(row: Row, options: ReadOptions) -> None:
    """ValueError for token ids, unless another column is chosen."""
    names = list(row.values)
    ids = columns.choose_column(names, None, (columns.TOKEN_IDS,), row.place)
    if ids is None or options.text_column not in (None, ids):
        return
    what = "text and token ids" if columns.has_text(names) else "token ids"
    raise ValueError(
        f"{row.place}: holds {what}; token ids are read from Parquet or Arrow files, text with "
        "--text-column NAME"
    )


def _texts(rows: Iterable[Row], column: str, report: ReadReport) -> Iterator[Document]:
    for place, values in rows:
        text = values.get(column)
        if isinstance(text, str):
            yield from document(place, text, report)
        else:
            problem = f"{column!r} is missing" if text is None else f"{column!r} is not text"
            report.reject("row without text", place, problem)

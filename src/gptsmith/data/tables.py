"""Rows to documents: .jsonl .jsonl.gz .csv .tsv .parquet .arrow, one document per row."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptsmith.data.documents import Document, Reader, document

# Names under which data sets keep the text of a document; "text" wins over the others.
_TEXT_COLUMNS = ("content", "document", "article", "story", "body", "sentence", "review")


Row = tuple[str, dict[str, Any]]  # place, values by column


def table_documents(path: Path, reader: Reader) -> Iterator[Document]:
    """The rows of a .jsonl, .jsonl.gz, .csv, .tsv, .parquet or .arrow file."""
    if _is(path, ".parquet", ".arrow"):
        rows = _table_rows(path, reader)
    elif _is(path, ".csv", ".tsv"):
        rows = _csv_rows(path, reader)
    else:
        rows = _json_rows(path, reader)
    return row_documents(rows, reader)


def _is(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)


def row_documents(rows: Iterable[Row], reader: Reader) -> Iterator[Document]:
    """One document per row, from its text column."""
    column = None
    for place, row in rows:
        column = column or text_column(row, place, reader)
        text = row.get(column)
        if isinstance(text, str):
            yield from document(place, text, reader)
        else:
            what = f"{column!r} is missing" if text is None else f"{column!r} is not text"
            reader.problem("row without text", place, what)


def text_column(row: dict[str, Any], place: str, reader: Reader) -> str:
    """The column that holds the text: the one asked for, "text", or the only one it can be."""
    if reader.text_column is not None:
        if reader.text_column in row:
            return reader.text_column
        raise ValueError(f"{place}: no column {reader.text_column!r}; there are {_listed(row)}")
    if "text" in row:
        return "text"
    known = [name for name in _TEXT_COLUMNS if name in row]
    texts = [name for name, value in row.items() if isinstance(value, str)]
    for found in (known, texts):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"{place}: which column holds the text? There are {_listed(row)}; say --text-column NAME"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _json_rows(path: Path, reader: Reader) -> Iterator[Row]:
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        file: io.BufferedIOBase = raw
        if _is(path, ".gz"):
            file = stack.enter_context(gzip.open(raw))
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path}: a damaged gzip file ({error})") from None
            reader.reached(path, raw.tell())
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except UnicodeDecodeError as error:
                reader.problem("line that is not UTF-8", place, f"not UTF-8 ({error.reason})")
            except (ValueError, RecursionError) as error:
                reader.problem("malformed line", place, f"not JSON ({error})")
            else:
                if isinstance(row, dict):
                    yield place, row
                else:
                    reader.problem("malformed line", place, "not a JSON object")


def _csv_rows(path: Path, reader: Reader) -> Iterator[Row]:
    """Rows under the names of the header line.

    Bytes that are not UTF-8 come through as lone surrogates, which `_document` reports: decoding
    strictly would fail at a buffer's end, far from the row at fault.
    """
    csv.field_size_limit(sys.maxsize)
    with (
        path.open("rb") as raw,
        io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file,
    ):
        # A .tsv has no quotes (IANA text/tab-separated-values): a lone " is just that.
        dialect: dict[str, Any] = (
            {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if _is(path, ".tsv")
            else {"strict": True}
        )
        rows = csv.reader(file, **dialect)
        header: list[str] | None = None
        while True:
            place = f"{path}:{rows.line_num + 1}"
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                reader.problem("malformed row", place, f"cannot be read ({error})")
                continue
            reader.reached(path, raw.tell())
            if header is None:
                header = values
                _check_header(header, path, reader)
            elif len(values) == len(header):
                yield place, dict(zip(header, values, strict=True))
            elif values:
                what = f"{len(values)} fields where the header has {len(header)}"
                reader.problem("malformed row", place, what)


def _check_header(header: list[str], path: Path, reader: Reader) -> None:
    """Two columns of one name would be one; a first row must not be lost as a header line."""
    wanted = reader.text_column
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for name in header for c in name):
        raise ValueError(f"{path}:1: the header line is not UTF-8; save the file as UTF-8")
    _refuse_twice(header, f"{path}:1")
    if wanted is None and not {"text", *_TEXT_COLUMNS} & set(header):
        raise ValueError(
            f"{path}:1: no column is called text; the header line is {_listed(header) or 'empty'}; "
            "say --text-column NAME (a file without a header line needs one)"
        )
    if wanted is not None and wanted not in header:
        raise ValueError(f"{path}:1: no column {wanted!r}; there are {_listed(header)}")


def _refuse_twice(names: list[str], place: str) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"{place}: two columns are called {twice[0]!r}; rename one")


def _table_rows(path: Path, reader: Reader) -> Iterator[Row]:
    schema = table_schema(path)
    is_text = {name: _is_text(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    _refuse_twice(schema.names, str(path))
    example = {name: "" if is_text[name] else None for name in schema.names}
    column = text_column(example, str(path), reader)
    if not is_text[column]:
        kind = schema.field(column).type
        raise ValueError(f"{path}: column {column!r} holds {kind}, not text")
    number = 0
    for batch in table_batches(path, [column], reader):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, row {number + 1} or later: {error}") from None
        for text in texts:
            number += 1
            yield f"{path}, row {number}", {column: text}


def _is_text(kind: pa.DataType) -> bool:
    kinds = pa.types
    if kinds.is_dictionary(kind):  # what pandas calls a category
        return _is_text(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def table_schema(path: Path) -> pa.Schema:
    """Names and types of the columns. ValueError naming a file that cannot be read."""
    try:
        if _is(path, ".parquet"):
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return _open_arrow(source).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from None


def table_batches(path: Path, columns: list[str], reader: Reader) -> Iterator[pa.RecordBatch]:
    """The named columns, some hundred rows at a time."""
    size, rows = path.stat().st_size, 0
    try:
        if _is(path, ".parquet"):
            with pq.ParquetFile(path) as file:
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=512, columns=columns):
                    rows += len(batch)
                    yield batch
                    reader.reached(path, size * rows // total)
        else:
            with pa.memory_map(str(path)) as source:
                opened = _open_arrow(source)
                stream = isinstance(opened, pa.RecordBatchStreamReader)
                count = 0 if stream else opened.num_record_batches
                whole = iter(opened) if stream else map(opened.get_batch, range(count))
                for batch in whole:
                    yield batch.select(columns)
                    if stream:
                        reader.reached(path, source.tell())
    except pa.ArrowException as error:
        raise ValueError(f"{path}, after row {rows}: damaged ({error})") from None


def _open_arrow(source: pa.MemoryMappedFile) -> Any:
    """Both forms of Arrow IPC carry the name .arrow; `datasets` writes streams."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)

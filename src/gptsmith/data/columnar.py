"""Parquet and Arrow files: their schema, and their columns in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport

SUFFIXES = (".parquet", ".arrow")
_BATCH = 512  # rows


def read_schema(path: Path) -> pa.Schema:
    """Names and types of the columns. ValueError naming a file that cannot be read."""
    try:
        if has_suffix(path, ".parquet"):
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return _open_arrow(source).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from None


def read_batches(
    path: Path, columns: Sequence[str], report: ReadReport
) -> Iterator[pa.RecordBatch]:
    """The named columns, a few hundred rows at a time. ValueError for a damaged file."""
    size, rows = path.stat().st_size, 0
    try:
        if has_suffix(path, ".parquet"):
            with pq.ParquetFile(path) as file:
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
                    rows += len(batch)
                    yield batch
                    report.reached(path, size * rows // total)
        else:
            with pa.memory_map(str(path)) as source:
                opened = _open_arrow(source)
                stream = isinstance(opened, pa.RecordBatchStreamReader)
                count = 0 if stream else opened.num_record_batches
                for batch in iter(opened) if stream else map(opened.get_batch, range(count)):
                    for start in range(0, len(batch), _BATCH):
                        yield batch.select(list(columns)).slice(start, _BATCH)
                    rows += len(batch)
                    if stream:
                        report.reached(path, source.tell())
    except pa.ArrowException as error:
        raise ValueError(f"{path}, after row {rows}: damaged ({error})") from None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    kinds = pa.types
    if kinds.is_dictionary(kind):  # a category in pandas
        return is_text(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _open_arrow(source: pa.MemoryMappedFile) -> Any:
    """Open either format of Arrow IPC: both use the suffix .arrow; `datasets` writes streams."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)

"""Parquet and Arrow files: their schema, and their columns in batches of bounded size.

pyarrow trusts its input: a flipped bit can crash the process, and a few bytes can expand to
gigabytes. So files are opened and validated in a worker process (sandbox.py), which sends valid
batches; the functions that run there are at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptsmith import sandbox
from gptsmith.data.paths import has_suffix
from gptsmith.data.row import check_unique
from gptsmith.recognize import COLUMNAR

if TYPE_CHECKING:
    from gptsmith.data.report import ReadReport

SUFFIXES = COLUMNAR
_BATCH = 256  # rows
_LARGE = 4 << 20  # bytes of a batch
_SECONDS, _MEMORY = 2.0, 384 << 20  # and more for large files


def read_schema(path: Path) -> pa.Schema:
    """Names and types of the columns. ValueError naming a file that cannot be read, or that has two
    columns of the same name."""
    _, data = _in_worker(sandbox.call, schema_of, path)
    schema = pa.ipc.read_schema(pa.py_buffer(data))
    check_unique(schema.names, str(path))
    return schema


def read_batches(
    path: Path, columns: Sequence[str], report: ReadReport
) -> Iterator[pa.RecordBatch]:
    """The named columns, a few hundred rows at a time. ValueError for a damaged file."""
    for offset, data in _in_worker(sandbox.stream, batches_of, path, list(columns)):
        with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
            yield reader.read_next_batch()
        report.reached(path, offset)


def check_arrow(path: Path, schema: pa.Schema, wrong_schema: str) -> None:
    """ValueError unless an Arrow file has these columns, and valid values, none of them null.

    wrong_schema: the problem to report for a file with other columns.
    """
    _in_worker(sandbox.call, validate_arrow, path, [str(field) for field in schema], wrong_schema)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    kinds = pa.types
    if kinds.is_dictionary(kind):  # a category in pandas
        return is_text(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _in_worker(run: Callable, function: Callable, path: Path, *arguments: Any) -> Any:
    """Call or stream one of the functions below, with limits that suffice even if one batch is as
    large as the file."""
    size = path.stat().st_size
    return run(
        f"{__name__}:{function.__name__}",
        str(path),
        *arguments,
        what=str(path),
        seconds=_SECONDS + size / (100 << 20),
        memory=_MEMORY + 4 * size,
    )


# --- in the worker -------------------------------------------------------------------------------


def schema_of(path: str) -> tuple[None, memoryview]:
    """The schema, serialized."""
    with _readable(path, f"cannot be read as {Path(path).suffix[1:]}"):
        if has_suffix(Path(path), ".parquet"):
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(path) as source:
                schema = _open_arrow(source).schema
        _ = str([*schema.names, *schema.types])  # decodes all names
        return None, memoryview(schema.serialize())


def validate_arrow(path: str, fields: list[str], wrong_schema: str) -> None:
    """See check_arrow."""
    with _readable(path, "cannot be read as an Arrow file"), pa.memory_map(path) as source:
        opened = pa.ipc.open_file(source)
        if [str(field) for field in opened.schema] != fields:
            raise ValueError(f"{path}: {wrong_schema}")
        for i in range(opened.num_record_batches):
            batch = opened.get_batch(i)
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise ValueError(f"{path}: damaged, it has empty values")


def batches_of(path: str, columns: list[str]) -> Iterator[tuple[int, memoryview]]:
    """Position in the file in bytes, and a serialized batch."""
    rows = 0
    for offset, batch in _batches(path, columns):
        with _readable(path, f"damaged after row {rows}"):
            batch.validate(full=True)
        for start in range(0, len(batch), _BATCH):
            with _readable(path, f"damaged after row {rows}"):
                part = _decoded(batch.slice(start, _BATCH))
                if part.nbytes > _LARGE or not all(map(_is_plain, part.schema.types)):
                    part.to_pylist()  # values may take far more memory than the batch
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
            yield offset, memoryview(sink.getvalue())
            rows += len(part)


def _batches(path: str, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    size, rows = Path(path).stat().st_size, 0
    with _readable(path, "damaged"):
        if has_suffix(Path(path), ".parquet"):
            with pq.ParquetFile(path, pre_buffer=False) as file:
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                    rows += len(batch)
                    yield size * rows // total, batch
            return
        with pa.memory_map(path) as source:
            opened = _open_arrow(source)
            if isinstance(opened, pa.RecordBatchStreamReader):
                for batch in opened:
                    yield source.tell(), batch.select(columns)
                return
            for i in range(opened.num_record_batches):
                part = opened.get_batch(i).select(columns)
                yield size * (i + 1) // opened.num_record_batches, part


def _open_arrow(source: pa.MemoryMappedFile) -> Any:
    """Open either format of Arrow IPC: both use the suffix .arrow; `datasets` writes streams."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with dictionary columns decoded (a dictionary would be sent with every slice),
    small floats by the shortest decimal (to_pylist would widen 0.1 to 0.10000000149011612), and
    times in microseconds (to_pylist needs pandas for smaller units)."""
    columns = []
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_float16(column.type):
            texts = [None if v is None else str(v) for v in column.to_numpy(zero_copy_only=False)]
            column = pa.array(texts, pa.string(), from_pandas=True).cast(pa.float64())
        if pa.types.is_float32(column.type):
            column = column.cast(pa.string()).cast(pa.float64())
        if (kind := _in_microseconds(column.type)) != column.type:
            column = column.cast(kind, safe=False)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """The type with microseconds instead of nanoseconds, also in lists and structs."""
    kinds = pa.types
    if kinds.is_list(kind) or kinds.is_large_list(kind):  # pandas writes the one, Polars the other
        make = pa.list_ if kinds.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    if kinds.is_struct(kind):
        return pa.struct([field.with_type(_in_microseconds(field.type)) for field in kind])
    if not kinds.is_temporal(kind) or getattr(kind, "unit", "") != "ns":
        return kind
    if kinds.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if kinds.is_duration(kind) else pa.time64("us")


def _is_plain(kind: pa.DataType) -> bool:
    """Whether the Python values take about as much memory as the column. Not so for types that
    store a value once for many rows, or that store nothing (null)."""
    kinds = pa.types
    if kinds.is_list(kind) or kinds.is_large_list(kind):
        return not kinds.is_boolean(kind.value_type) and _is_plain(kind.value_type)
    if kinds.is_struct(kind):
        return kind.num_fields > 0 and all(_is_plain(field.type) for field in kind)
    simple = (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_string)
    return any(is_kind(kind) for is_kind in (*simple, kinds.is_large_string))


@contextmanager
def _readable(path: str, problem: str) -> Iterator[None]:
    """Turn any error that pyarrow raises for damaged content into a ValueError naming the file."""
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # ArrowException, OSError, SystemError, IndexError, KeyError, ...
        if isinstance(error, ValueError) and str(error).startswith(path):
            raise  # it says so already
        raise ValueError(f"{path}: {problem} ({' '.join(str(error).split())[:200]})") from None

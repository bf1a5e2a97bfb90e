"""Tables for tests, in the format of the file's suffix."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, *rows: Any) -> Path:
    """The rows as .parquet, .arrow, .csv, .json or .jsonl(.gz)."""
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        case ".arrow":
            write_arrow(path, pa.Table.from_pylist(list(rows)))
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".json":
            path.write_text(json.dumps(rows))
        case suffix:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(lines) if suffix == ".gz" else lines)
    return path


def write_arrow(path: Path, table: pa.Table, **options: Any) -> None:
    """An Arrow file; in the format of streams if its name contains "stream"."""
    new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as sink:
        sink.write_table(table)

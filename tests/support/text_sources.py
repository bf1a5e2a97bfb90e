"""Sources of documents for tests: files to read, and their texts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptsmith.data.documents import Source
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.sources import open_source

ROWS = ["first text", "second\ntext", 'third "text", ünïcode 🙂']


def opened(asked: str | Path, report: ReadReport | None = None, **options: Any) -> Source:
    return open_source(str(asked), ReadOptions(**options), report or ReadReport("stop"))


def read(asked: str | Path, report: ReadReport | None = None, **options: Any) -> list[str]:
    """The texts of a source's documents."""
    return texts(opened(asked, report, **options).documents())


def texts(documents) -> list[str]:  # type: ignore[no-untyped-def]
    return ["".join(document.chunks) for document in documents]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, rows: list[str]) -> Path:
    """`rows` in the format of the file's suffix."""
    table = pa.table({"id": range(len(rows)), "text": rows})
    if path.name.endswith(".gz"):
        path.write_bytes(
            gzip.compress("".join(json.dumps({"text": r}) + "\n" for r in rows).encode())
        )
    elif path.suffix == ".jsonl":
        jsonl(path, [{"id": i, "text": row} for i, row in enumerate(rows)])
    elif path.suffix == ".csv":
        quoted = ['"' + row.replace('"', '""') + '"' for row in rows]
        path.write_text("id,text\n" + "".join(f"{i},{q}\n" for i, q in enumerate(quoted)))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.stem == "stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    return path

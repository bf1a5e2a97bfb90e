"""Sources of documents for tests: files to read, and their texts."""

from pathlib import Path
from typing import Any

from tables import write

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


def write_rows(path: Path, rows: list[str]) -> Path:
    """`rows` in the format of the file's suffix."""
    return write(path, *({"id": i, "text": row} for i, row in enumerate(rows)))

"""Parquet and Arrow files of strangers: whatever their bytes, rows or one line, and no crash."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import write_arrow

from gptsmith import sandbox
from gptsmith.data import columnar
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import read_rows

ROWS: list[dict[str, Any]] = [
    {"text": "the first", "n": 1, "list": [{"role": "user", "content": "a"}]},
    {"text": "ünïcode 🙂", "n": None, "list": []},
    {"text": None, "n": 3, "list": None},
]
TABLE = pa.Table.from_pylist(ROWS)


def write(path: Path, table: pa.Table = TABLE, **options: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        write_arrow(path, table, **options)
    return path


def outcome(path: Path) -> Any:
    """The rows of a file, or the error, which must be one line that names the file."""
    try:
        return [row.values for row in read_rows(path)]
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert text.startswith(str(path))
        assert len(text.splitlines()) == 1
        assert len(text) < 600 + len(str(path))
        return text


def damaged(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    for _ in range(count):
        new = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
        yield bytes(new[: rng.choice((None, None, None, rng.randrange(len(new))))])


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("a.parquet", {}),
    ("zstd.parquet", {"compression": "zstd", "store_schema": False, "use_dictionary": False}),
    ("file.arrow", {}),
    ("lz4-stream.arrow", {"compression": "lz4"}),
]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_damaged_bytes_give_rows_or_one_line(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = write(tmp_path / name, **options)
    data = path.read_bytes()
    assert outcome(path) == ROWS
    found = []
    for new in damaged(data, random.Random(name), 60):
        path.write_bytes(new)
        found.append(outcome(path))
    assert sum(isinstance(one, str) for one in found) > 5


def test_each_bit_of_a_small_arrow_file(tmp_path: Path) -> None:
    table = pa.table({"text": ["one text", "another"], "label": ["a", "b"]})
    path = write(tmp_path / "a.arrow", table)
    data = path.read_bytes()
    expected = outcome(path)
    texts = {value for row in expected for value in row.values()}
    same = other = rejected = 0
    for at in range(0, len(data), 3):  # every third byte; `make fuzz` takes the others
        new = bytearray(data)
        new[at] ^= 1 << at % 8
        path.write_bytes(bytes(new))
        found = outcome(path)
        if isinstance(found, str):
            rejected += 1
        elif found == expected:
            same += 1
        else:  # a flipped bit of the text itself
            other += 1
            assert len(found) <= len(expected)
    assert same
    assert rejected
    assert other < len("".join(texts)) + 40


def huge(kind: str) -> pa.Table:
    """A few bytes that stand for many values."""
    n = 1 << 31
    if kind == "fixed size":
        return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.nulls(n - 1), n - 1)})
    if kind == "nulls":
        offsets = pa.array(np.array([0, n - 1], np.int64))
        return pa.table({"x": pa.LargeListArray.from_arrays(offsets, pa.nulls(n - 1))})
    words = pa.array(["a" * (8 << 20)])
    indices = pa.array([0] * 300, pa.int8())
    inner = pa.DictionaryArray.from_arrays(indices, words)
    if kind == "dictionary":
        return pa.table({"x": inner})
    return pa.table({"x": pa.ListArray.from_arrays(pa.array([0, 300], pa.int32()), inner)})


@pytest.mark.parametrize("kind", ["fixed size", "nulls", "dictionary", "nested dictionary"])
def test_values_that_take_no_space_in_the_file_are_bounded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "_SECONDS", 0.5)
    path = write(tmp_path / "a.arrow", huge(kind), compression="zstd")
    assert path.stat().st_size < 50 << 20
    found = outcome(path)
    assert isinstance(found, str)
    assert "was stopped" in found


def test_pages_that_grow_when_they_are_decompressed_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "_MEMORY", 64 << 20)
    table = pa.table({"text": ["a" * (90 << 20)]})
    path = write(
        tmp_path / "a.parquet", table, compression="zstd", use_dictionary=False,
        data_page_size=1 << 30, write_statistics=False,
    )  # fmt: skip
    assert path.stat().st_size < 1 << 20
    assert "was stopped" in outcome(path)


def test_large_honest_files_are_read(tmp_path: Path) -> None:
    texts = [f"{n} " * 40_000 for n in range(60)]  # 12 MB in one batch
    for name in ("a.parquet", "b.arrow"):
        path = write(tmp_path / name, pa.table({"text": texts}))
        assert [row["text"] for row in outcome(path)] == texts


def test_values_of_many_types_are_those_of_pyarrow(tmp_path: Path) -> None:
    columns = {
        "category": pa.array(["a", "b", "a", None]).dictionary_encode(),
        "nested": pa.array([[1], [], None, [2, None]]),
        "time": pa.array([0, 1, None, 10**15], pa.timestamp("us", "UTC")),
        "bytes": pa.array([b"\xff", b"", None, b"x"]),
        "struct": pa.array([{"a": 1, "b": None}, None, {"a": 2, "b": "x"}, {"a": 3, "b": ""}]),
        "decimal": pa.array([1, None, 2, 3]).cast(pa.decimal128(30, 2)),
        "none": pa.nulls(4),
    }
    table = pa.table(columns)
    for name in ("a.parquet", "b.arrow", "c-stream.arrow"):
        assert outcome(write(tmp_path / name, table)) == table.to_pylist()


def test_nanoseconds_are_read_as_microseconds(tmp_path: Path) -> None:
    """Python's own types have no nanoseconds: pyarrow would need pandas, or reject the row."""
    nested = pa.list_(pa.struct([("at", pa.timestamp("ns", "UTC"))]))
    table = pa.table(
        {
            "at": pa.array([1_700_000_000_000_001_999, None], pa.timestamp("ns")),
            "took": pa.array([1_000_001_999, None], pa.duration("ns")),
            "time": pa.array([1_000_001_999, None], pa.time64("ns")),
            "messages": pa.array([[{"at": 1_999}], []], nested),
            "polars": pa.array([[1_999], None], pa.large_list(pa.timestamp("ns"))),
        }
    )
    moment = datetime(2023, 11, 14, 22, 13, 20, 1)
    expected = {
        "at": moment,
        "took": timedelta(seconds=1, microseconds=1),
        "time": time(0, 0, 1, 1),
        "messages": [{"at": datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC)}],
        "polars": [datetime(1970, 1, 1, 0, 0, 0, 1)],
    }
    for name in ("a.parquet", "b.arrow"):
        rows = outcome(write(tmp_path / name, table))
        assert rows == [expected, {**dict.fromkeys(expected), "messages": []}]
        assert type(rows[0]["at"]) is datetime


def test_files_are_opened_in_a_worker_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.arrow")
    for name in ("memory_map", "OSFile"):
        monkeypatch.setattr(pa, name, None)
    assert columnar.read_schema(path).names == ["text", "n", "list"]
    assert outcome(path) == ROWS


def test_reading_may_stop_early_and_files_may_alternate(tmp_path: Path) -> None:
    long = pa.table({"n": range(5000)})
    paths = [write(tmp_path / name, long) for name in ("a.parquet", "b.arrow")]
    readers = [columnar.read_batches(path, ["n"], ReadReport()) for path in paths]
    for _ in range(3):
        first, second = (next(reader) for reader in readers)
        assert first.column("n").to_pylist() == second.column("n").to_pylist()
    for reader in readers:
        reader.close()  # type: ignore[attr-defined]
    assert outcome(paths[0]) == long.to_pylist()


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.arrow", "c-stream.arrow"):
        path, report = write(tmp_path / name), ReadReport()
        assert list(columnar.read_batches(path, ["n"], report))
        assert 0 < report.position <= path.stat().st_size


def test_a_crash_of_the_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.arrow")

    def call(*arguments: Any, **options: Any) -> Any:
        return real("worker_functions:fail", "abort", **options)

    real = sandbox.call
    monkeypatch.setattr(sandbox, "call", call)
    with pytest.raises(ValueError, match=r"a\.arrow crashed, or needs more"):
        columnar.read_schema(path)

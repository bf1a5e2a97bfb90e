"""Every table format gives the same rows with their places; errors name the place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import complete_data
from tables import write_arrow

from gptsmith.data.report import ReadReport
from gptsmith.data.rows import read_rows

ROWS: list[dict[str, Any]] = [
    {"text": "first", "label": "a"},
    {"text": 'two\n"lines", ünïcode 🙂', "label": "b"},
    {"text": "", "label": "c"},
]


def values(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path, **options)]


def places(path: Path) -> list[str]:
    return [row.place.removeprefix(str(path.parent) + "/") for row in read_rows(path)]


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


CSV = 'text,label\nfirst,a\n"two\n""lines"", ünïcode 🙂",b\n,c\n'.encode()


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_forms_hold_the_same_rows(tmp_path: Path, zipped: str, mark: bytes) -> None:
    lines = write(tmp_path / f"a.jsonl{zipped}", mark + as_lines(ROWS).replace(b"\n", b"\r\n\n", 1))
    assert values(lines) == ROWS
    assert places(lines) == [f"{lines.name}:{n}" for n in (1, 3, 4)]
    whole = write(tmp_path / f"b.json{zipped}", mark + json.dumps(ROWS, indent=1).encode())
    assert values(whole) == ROWS
    assert places(whole) == [f"{whole.name}, row {n}" for n in (1, 2, 3)]
    by_line = write(tmp_path / f"c.json{zipped}", mark + as_lines(ROWS))
    assert (values(by_line), places(by_line)[-1]) == (ROWS, f"{by_line.name}:3")
    table = write(tmp_path / f"d.csv{zipped}", mark + CSV)
    assert values(table) == ROWS
    assert places(table) == [f"{table.name}:{n}" for n in (2, 3, 5)]
    tabs = write(tmp_path / f"e.tsv{zipped}", mark + b'text\tlabel\na "lone quote\tx\n')
    assert values(tabs) == [{"text": 'a "lone quote', "label": "x"}]


def test_columnar_files_of_many_batches(tmp_path: Path) -> None:
    rows = [{"n": n, "list": [{"role": "user", "content": str(n)}]} for n in range(1500)]
    table = pa.Table.from_pylist([*rows, {"n": None, "list": None}])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    write_arrow(tmp_path / "b.arrow", table)
    write_arrow(tmp_path / "stream.arrow", table)
    for name in ("a.parquet", "b.arrow", "stream.arrow"):
        assert values(tmp_path / name) == [*rows, {"n": None, "list": None}]
        assert places(tmp_path / name)[1023] == f"{name}, row 1024"


def test_a_bare_list_is_a_row_of_messages(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    expected = [{"messages": chat} for chat in chats]
    assert values(write(tmp_path / "a.jsonl", as_lines(chats))) == expected
    assert values(write(tmp_path / "b.json", as_lines(chats))) == expected
    assert values(write(tmp_path / "c.json", json.dumps(chats).encode())) == expected


def test_column_names_for_a_file_without_header_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"ham\thello\nspam\tbuy\n")
    rows = list(read_rows(path, header=("label", "text")))
    assert rows[0] == (f"{path}:1", {"label": "ham", "text": "hello"})
    assert len(rows) == 2


def test_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "deep" / "b.jsonl.gz", as_lines(ROWS[1:2]))
    write(tmp_path / "a.csv", CSV)
    write(tmp_path / ".hidden" / "c.jsonl", as_lines(ROWS))
    write(tmp_path / "state.json", b"{}")
    write(tmp_path / "README.md", b"words")
    assert values(tmp_path) == [*ROWS, ROWS[1]]
    monkeypatch.chdir(tmp_path)
    assert [row.place for row in read_rows("**/*.jsonl.gz")] == ["deep/b.jsonl.gz:1"]


def rejected(path: Path, **options: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        values(path, **options)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.splitlines()) == 1
    return text.replace(str(path), path.name)


def test_errors_name_file_and_place(tmp_path: Path) -> None:
    def bad(name: str, data: bytes) -> str:
        return rejected(write(tmp_path / name, data))

    good = as_lines(ROWS[:1])
    assert bad("a.jsonl", good + b'{"text": "x"\n').startswith("a.jsonl:2: not JSON (Expecting")
    assert "one list" in bad("b.json", b'{\n "rows": []}')
    assert bad("d.json", b'[{"a": 1},\n{"a": }]').startswith("d.json:2: not JSON")
    assert bad("d2.json", b"[1, 2]") == "d2.json, row 1: a row must be a JSON object, this is 1"
    assert bad("e.jsonl", good + b'{"text": "\xff"}\n').startswith("e.jsonl:2: not UTF-8")
    assert bad("e.json", b'["\xff"]').startswith(
        "e.json: not Unicode at character 2; save the file as UTF-8"
    )
    assert bad("f.jsonl", b"[" * 100_000) == (
        "f.jsonl:1: not JSON (nested too deeply); use a line per row, or a .json file with one list"
    )
    assert bad("g.csv", b"a,b,a\n1,2,3\n").startswith("g.csv:1: two columns are called 'a'")
    assert bad("h.csv", b"a,b\n1,2\n1,2,3\n") == "h.csv:3: 3 fields where the header has 2"
    assert bad("i.csv", b'a,b\n1,"2\n').startswith("i.csv:2: cannot be read")
    assert bad("j.csv", b"a,b\n1,\xff\n").startswith("j.csv:2: not UTF-8")
    assert bad("k.jsonl", b"") == "k.jsonl: the file is empty"
    assert "is a text file, not a table" in bad("l.txt", b"words")
    damaged = tmp_path / "m.jsonl.gz"
    damaged.write_bytes(gzip.compress(as_lines(ROWS) * 99)[:-9])
    assert "damaged gzip" in rejected(damaged)
    twice = pa.table([[1], [2]], names=["a", "a"])
    write_arrow(tmp_path / "n.arrow", twice)
    assert "two columns are called 'a'" in rejected(tmp_path / "n.arrow")
    assert "no such file" in rejected(tmp_path / "none.csv")
    assert "matches this pattern" in rejected(tmp_path / "*.nothing")
    with pytest.raises(FileNotFoundError, match="an address: download it, and give the file"):
        list(read_rows("https://example.org/a.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "in this folder" in rejected(tmp_path / "empty")
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    assert "splits train" in rejected(tmp_path / "set")


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_lines(ROWS[:1]) + b"{\n7\n" + as_lines(ROWS[2:]))
    report = ReadReport("skip")
    assert values(path, report=report) == [ROWS[0], ROWS[2]]
    assert report.skipped.counts() == {"malformed line": 2}
    assert report.position == path.stat().st_size
    table = write(tmp_path / "b.csv", b"a,b\n1,2\n1\n1,\xff\n3,4\n")
    assert values(table, report=report) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    with pytest.raises(ValueError, match="--on-error skip"):
        values(path, report=ReadReport("stop"))


def test_real_tables(real_data: Path) -> None:
    counts = {
        "chat_nanochat_identity": 20,
        "chat_taskmaster4": 30,
        "instruction_data/instruction-data.json": 60,
    }
    for name, count in counts.items():
        assert sum(1 for _ in read_rows(real_data / name)) == count


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("sst2_glue/train.tsv", 3_806_075, 67349),
        ("instruction_data/instruction-data.json", 203_524, 1100),
    ],
)
def test_complete_tables(name: str, size: int, count: int) -> None:
    assert sum(1 for _ in read_rows(complete_data({name: size}) / name)) == count

"""Examples in memory and in a mapped file are the same, as a whole and in parts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tables import write

from gptsmith.batch import IGNORE_INDEX
from gptsmith.data import examples as module
from gptsmith.data.examples import Example, Examples, is_chat_set, write_examples


def make(n: int, longest: int = 30) -> list[Example]:
    random = np.random.default_rng(7)
    made = []
    for i in range(n):
        ids = random.integers(0, 50_000, random.integers(2, longest + 1)).astype(np.int32)
        labels = np.where(random.random(len(ids)) < 0.5, ids, IGNORE_INDEX).astype(np.int32)
        made.append(Example(ids, labels, f"chat.jsonl:{i + 1}"))
    return made


def same(a: Example, b: Example) -> bool:
    return a.ids.tolist() == b.ids.tolist() and a.labels.tolist() == b.labels.tolist()


@pytest.mark.parametrize("tokens", [1, 40, 1 << 18])
def test_file_and_memory_agree_for_any_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    made = make(50)
    memory = Examples(made)
    monkeypatch.setattr(module, "_TOKENS", tokens)
    path = tmp_path / "chat.arrow"
    write_examples(path, iter(made), {"T": 31, "template": "ünï"})
    mapped = Examples(path)
    assert is_chat_set(path)
    assert mapped.metadata == {"T": 31, "template": "ünï"}
    for each in (memory, mapped, Examples(made)):
        assert len(each) == 50
        assert all(same(a, b) and a.name == b.name for a, b in zip(each, made, strict=True))
        assert each.lengths.tolist() == [len(e.ids) for e in made]
        assert each.target_lengths.tolist() == [(e.labels[1:] != IGNORE_INDEX).sum() for e in made]
        assert each.tokens == sum(len(e.ids) for e in made)
        assert each.targets == sum(int((e.labels[1:] != IGNORE_INDEX).sum()) for e in made)
        assert each.fingerprint == memory.fingerprint
        assert each[3].ids.dtype == each[3].labels.dtype == np.int32
    with pytest.raises(IndexError):
        mapped[50]


def test_fingerprint_depends_on_contents_and_boundaries() -> None:
    made = make(5)
    prints = {Examples(made).fingerprint, Examples(made[::-1]).fingerprint}
    joined = Example(*(np.concatenate([a, b]) for a, b in zip(*(e[:2] for e in made[:2]))), "")  # type: ignore[arg-type]  # noqa: B905
    prints.add(Examples([joined, *made[2:]]).fingerprint)
    changed = made[0].labels.copy()
    changed[1] = IGNORE_INDEX if changed[1] != IGNORE_INDEX else made[0].ids[1]
    prints.add(Examples([made[0]._replace(labels=changed), *made[1:]]).fingerprint)
    assert len(prints) == 4
    renamed = [e._replace(name="elsewhere") for e in made]
    assert Examples(renamed).fingerprint == Examples(made).fingerprint


def test_take_and_split(tmp_path: Path) -> None:
    made = make(20)
    write_examples(tmp_path / "a.arrow", made, {})
    for whole in (Examples(made), Examples(tmp_path / "a.arrow")):
        part = whole.take([7, 3, 19])
        assert [e.name for e in part] == ["chat.jsonl:8", "chat.jsonl:4", "chat.jsonl:20"]
        assert part.lengths.tolist() == [len(made[i].ids) for i in (7, 3, 19)]
        again = part.take([1])
        assert (len(again), again[0].name, again.tokens) == (1, "chat.jsonl:4", len(made[3].ids))
        prints = {whole.fingerprint, part.fingerprint, again.fingerprint}
        assert len(prints | {whole.take([7, 3]).fingerprint}) == 4
        train, val, test = whole.split((0.8, 0.1, 0.1), seed=1)
        assert [len(train), len(val), len(test)] == [15, 2, 3]
        names = [e.name for split in (train, val, test) for e in split]
        assert sorted(names) == sorted(e.name for e in made)
        assert [e.name for e in whole.split((0.8, 0.1, 0.1), seed=1)[1]] == [e.name for e in val]
        assert [e.name for e in whole.split((0.8, 0.1, 0.1), seed=2)[1]] != [e.name for e in val]
    tiny = Examples(made[:2])
    assert [len(part) for part in tiny.split((0.999, 0.001), seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="2 conversation"):
        tiny.split((1, 1, 1), seed=0)
    assert (len(Examples([])), Examples([]).tokens) == (0, 0)


def test_file_is_memory_mapped(tmp_path: Path) -> None:
    long = np.zeros(50_000, np.int32)
    path = tmp_path / "big.arrow"
    write_examples(path, (Example(long, long, "x") for _ in range(200)), {})
    assert path.stat().st_size > 80_000_000
    before = pa.total_allocated_bytes()
    mapped = Examples(path)
    assert (mapped.tokens, mapped.targets) == (10_000_000, 200 * 49_999)
    assert mapped[150].ids.sum() == 0
    assert pa.total_allocated_bytes() - before < 100_000


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Example]:
        yield from make(3)
        raise ValueError("chat.jsonl:4: bad")

    with pytest.raises(ValueError, match=r"chat\.jsonl:4"):
        write_examples(tmp_path / "a.arrow", broken(), {})
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path, {"input_ids": [1, 2], "labels": [1, 2]})
    assert not is_chat_set(path)
    with pytest.raises(ValueError, match="not a file of examples"):
        Examples(path)
    write_examples(path, make(3), {})
    data = path.read_bytes()
    for damaged in (data[:-20], data[: len(data) // 2], b"", b"words"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read as an Arrow file"):
            Examples(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Examples(tmp_path / "none.arrow")


def test_flipped_bits_are_found_or_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_examples(path, make(3), {"context": 64})
    data = path.read_bytes()
    expected = [(e.ids.tolist(), e.labels.tolist(), e.name) for e in Examples(path)]
    found = 0
    for at in range(0, len(data), 29):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            examples = Examples(path)
        except ValueError as error:
            found += str(error).startswith(str(path))
            continue
        assert [(e.ids.tolist(), e.labels.tolist()) for e in examples] == [e[:2] for e in expected]
        found += 1
    assert found == len(range(0, len(data), 29))

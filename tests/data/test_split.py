"""Splits are a function of keys and seed, and stay the same from version to version."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.data.examples import Example, Examples
from gptsmith.data.instructions import Instruction, split_instructions
from gptsmith.data.options import SplitConfig
from gptsmith.data.split import fill_splits, group_rows, hash_order


def test_groups_keep_the_order_of_their_keys() -> None:
    assert group_rows(["b", "a", "b", "c"]) == {"b": [0, 2], "a": [1], "c": [3]}


def test_hash_order_depends_on_key_and_seed_alone() -> None:
    keys = [f"key {i}" for i in range(50)]
    order = [keys[i] for i in hash_order(keys, 0)]
    assert [keys[::-1][i] for i in hash_order(keys[::-1], 0)] == order
    assert [keys[i] for i in hash_order(keys, 1)] != order
    grown = [*keys, "another"]
    assert [grown[i] for i in hash_order(grown, 0) if i < 50] == order


@given(st.lists(st.integers(1, 5), max_size=30), st.integers(0, 20), st.integers(0, 20))
def test_fill_respects_the_room_and_loses_nothing(sizes: list[int], a: int, b: int) -> None:
    splits = fill_splits(range(len(sizes)), (a, b), sizes)
    assert sorted(number for part in splits for number in part) == list(range(len(sizes)))
    for room, part in zip((a, b), splits, strict=False):
        assert sum(sizes[i] for i in part) <= room


def test_fill_takes_groups_in_order() -> None:
    assert fill_splits([3, 0, 2, 1], (1, 2)) == [[3], [0, 2], [1]]
    assert fill_splits([3, 0, 2, 1], (2, 9), [1, 1, 1, 3]) == [[0, 2], [1, 3], []]


def test_splits_of_runs_made_before_stay_the_same() -> None:
    """A resumed run reads and splits its data again: it must get the same samples."""
    words = ["amber", "birch", "cedar", "delta", "ember"]
    rows = [
        Instruction(f"Q {i % 60} {words[i % 5]}", words[i % 3] if i % 2 else "", str(i), f"x:{i}")
        for i in range(150)
    ]
    parts = split_instructions(rows, SplitConfig(split_seed=5, val_fraction=0.2, test_fraction=0.1))
    places = [[row.place for row in part] for part in (parts.train, parts.val, parts.test)]
    assert hashlib.sha256(repr(places).encode()).hexdigest()[:16] == "73a5e05fc722bcab"
    examples = Examples(
        Example(*(np.arange(i, i + 3, dtype=np.int32) for _ in range(2)), name=str(i))
        for i in range(97)
    )
    found = [part.fingerprint[:12] for part in examples.split((0.95, 0.05), seed=7)]
    assert found == ["a57ca1dd7a3d", "47bfdf052cca"]

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from gptsmith.batch import IGNORE_INDEX
from gptsmith.data.classification import (
    EncodedTexts,
    LabelledRows,
    encode_labelled,
    encode_texts,
    pad,
)
from gptsmith.data.labelled import LabelledText
from gptsmith.tokenizer import Tokenizer

T, PAD = 40, 99
LENGTHS = [int(n) for n in np.random.RandomState(0).randint(1, T + 1, size=23)]
# The first id of a text is its number: rows of a batch can be identified.
TEXTS = EncodedTexts(
    [np.array([i] + [50] * (n - 1), np.uint16) for i, n in enumerate(LENGTHS)],
    [i % 3 for i in range(len(LENGTHS))],
    0,
)


def rows(step: int = 4, seed: int = 0, documents: bool = False) -> LabelledRows:
    return LabelledRows(TEXTS, T, seed, PAD, step, documents)


def numbers(samples: LabelledRows, first: int, count: int) -> list[int]:
    ids: Sequence[int] = samples.batch(first, count).inputs[:, 0].tolist()
    return list(ids)


def test_target_is_the_class_at_the_last_token() -> None:
    batch = rows().batch(3, 6)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == batch.targets.shape
    for ids, targets in zip(batch.inputs, batch.targets, strict=True):
        i = int(ids[0])
        assert ids.tolist() == TEXTS.ids[i].tolist() + [PAD] * (len(ids) - LENGTHS[i])
        expected = torch.full_like(targets, IGNORE_INDEX)
        expected[LENGTHS[i] - 1] = i % 3
        assert targets.tolist() == expected.tolist()
    assert batch.tokens == sum(LENGTHS[i] for i in batch.inputs[:, 0].tolist())
    assert batch.documents is None
    assert batch.name == "samples 3..8"


def test_padding_is_a_document_of_its_own_on_request() -> None:
    batch = rows(documents=True).batch(0, 6)
    assert batch.documents is not None
    for ids, documents in zip(batch.inputs, batch.documents, strict=True):
        n = LENGTHS[int(ids[0])]
        assert documents.tolist() == [0] * n + [1] * (len(ids) - n)


def test_batches_are_padded_to_a_multiple_of_eight() -> None:
    longest = max(LENGTHS[i] for i in numbers(rows(), 0, 2))
    assert rows().batch(0, 2).inputs.shape[1] == min(T, -(-longest // 8) * 8)
    ids, lengths = pad([np.array([1, 2, 3])], 0, limit=3)
    assert (ids.tolist(), lengths.tolist()) == ([[1, 2, 3]], [3])


@pytest.mark.parametrize("step", [1, 4, 7, 100])
def test_epoch_has_each_text_once(step: int) -> None:
    n = len(LENGTHS)
    samples = rows(step)
    order = numbers(samples, 0, 3 * n)
    epochs = [order[:n], order[n : 2 * n], order[2 * n :]]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert numbers(rows(step, seed=1), 0, n) != epochs[0]


def test_the_order_is_a_function_of_the_index() -> None:
    whole = numbers(rows(), 0, 70)
    for first, count in ((69, 1), (20, 11), (0, 5), (46, 3)):
        assert numbers(rows(), first, count) == whole[first : first + count]


def test_steps_are_random_and_sorted_by_length() -> None:
    shuffled, by_length = numbers(rows(step=1), 0, 69), numbers(rows(step=8), 0, 69)
    for first in range(0, 69, 8):
        step = by_length[first : first + 8]
        assert sorted(step) == sorted(shuffled[first : first + 8])
        # an epoch's end may lie within a step; each part is sorted
        falls = sum(LENGTHS[a] > LENGTHS[b] for a, b in pairwise(step))
        assert falls <= any((first + i) % 23 == 0 for i in range(1, 8))


def test_position_identifies_order_and_index() -> None:
    expected = {"seed": 5, "epoch": 2, "index": 4, "per_epoch": 23}
    assert rows(seed=5).position(50) == expected


def test_texts_are_stripped_and_truncated() -> None:
    tokenizer = Tokenizer.byte()
    ids, cut = encode_texts(tokenizer, [" ab\n", "abcdef", "abcd"], 4)
    assert [bytes(row.tolist()) for row in ids] == [b"ab", b"abcd", b"abcd"]
    assert cut == 1
    with pytest.raises(ValueError, match="' ' has no token"):
        encode_texts(tokenizer, ["a", " "], 4)


def test_text_that_cannot_be_encoded_is_named() -> None:
    tokenizer = Tokenizer.char(["abc"])
    texts = [LabelledText("ab", "y", "x.csv:2"), LabelledText("abd", "x", "x.csv:3")]
    with pytest.raises(ValueError, match=r"x\.csv:3: character 'd' at offset 2"):
        encode_labelled(tokenizer, texts, ("x", "y"), 8)
    found = encode_labelled(tokenizer, texts[:1], ("x", "y"), 8)
    assert (len(found.ids), found.classes, found.truncated, found.tokens) == (1, [1], 0, 2)


def test_take_is_evenly_spaced() -> None:
    part = TEXTS.take(5)
    assert [int(ids[0]) for ids in part.ids] == [0, 4, 9, 13, 18]
    assert part.classes == [0, 1, 0, 1, 0]
    assert TEXTS.take(1000).classes == TEXTS.classes
    assert len(TEXTS.take(0).ids) == 1

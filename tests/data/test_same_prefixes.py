"""Which positions have the same tokens up to them."""

import numpy as np
import pytest

from gptsmith.data.same_prefixes import same_prefixes


@pytest.mark.parametrize("seed", range(6))
def test_positions_with_equal_prefixes_have_one_representative(seed: int) -> None:
    random = np.random.default_rng(seed)
    B, T = 9, 7
    inputs = random.integers(3, size=(B, T))
    lengths = random.integers(1, T + 1, size=B)
    inputs[5], lengths[5] = inputs[2], lengths[2]
    found = same_prefixes(inputs, lengths)
    assert found is not None
    representatives: dict[tuple[int, ...], int] = {}
    for b in range(B):
        for t in range(T):
            number = int(found[b, t])
            if t >= lengths[b]:
                assert number == -1
                continue
            tokens = tuple(inputs[b, : t + 1].tolist())
            assert representatives.setdefault(tokens, number) == number
            row, at = divmod(number, T)
            assert at == t < lengths[row]
            assert tuple(inputs[row, : t + 1].tolist()) == tokens
            assert int(found[row, at]) == number
    assert len({*representatives.values()}) == len(representatives)


def test_padding_does_not_equal_a_token_of_the_same_id() -> None:
    found = same_prefixes(np.array([[1, 0, 0], [1, 0, 0], [1, 0, 5]]), np.array([1, 3, 3]))
    assert found is not None
    assert found[0].tolist()[1:] == [-1, -1]
    assert found[1, 1] == found[2, 1] >= 3
    assert found[1, 2] != found[2, 2]


def test_rows_without_a_common_beginning_and_padding_are_left_alone() -> None:
    assert same_prefixes(np.arange(20).reshape(4, 5), np.full(4, 5)) is None
    assert same_prefixes(np.array([[1, 2, 3]]), np.array([3])) is None

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.dataset import Windows, make_batch, validation_batches
from gptsmith.data.order import permutation
from gptsmith.tokenizer import DocumentTokens

few = settings(max_examples=25)
lengths = st.lists(st.integers(0, 60), min_size=1, max_size=5)


def make_shards(lengths: list[int]) -> list[np.ndarray]:
    """Shards whose tokens encode their position: token i of shard s is 1000 * s + i."""
    return [(1000 * s + np.arange(n)).astype(np.uint16) for s, n in enumerate(lengths)]


def epoch_of(windows: Windows, epoch: int) -> list[np.ndarray]:
    first = epoch * windows.per_epoch
    return [windows.row(i) for i in range(first, first + windows.per_epoch)]


def starts_of(windows: Windows, epoch: int) -> list[int]:
    return [int(row[0]) for row in epoch_of(windows, epoch)]


@given(lengths, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 3))
@few
def test_epoch_has_every_window_once_and_misses_less_than_one_per_shard(
    lengths: list[int], T: int, seed: int, epoch: int
) -> None:
    """Of a shard of n tokens, (n - 1) // T windows. With phase p (0 <= p < T) and the remainder
    r = (n - 1) % T, the targets that are not scored are the first p and, if p < r, the last r - p;
    if p > r, the last window overlaps the one before it by p - r instead."""
    shards = make_shards(lengths)
    if max(lengths) < T + 1:
        with pytest.raises(ValueError, match=f"are fewer than .* = {T + 1}:"):
            Windows(shards, T, seed, None)
        return
    windows = Windows(shards, T, seed, None)
    rows = epoch_of(windows, epoch)
    assert len(rows) == windows.per_epoch == sum(max(0, n - 1) // T for n in lengths)
    for row in rows:
        assert row.dtype == np.uint16
        assert (row == row[0] + np.arange(T + 1)).all()
    for shard, n in enumerate(lengths):
        count, rest = divmod(max(0, n - 1), T)
        starts = sorted(int(row[0]) - 1000 * shard for row in rows if row[0] // 1000 == shard)
        assert len(starts) == len(set(starts)) == count
        if not count:
            continue
        scored = {t for s in starts for t in range(s + 1, s + T + 1)}
        head, tail = min(scored) - 1, n - 1 - max(scored)
        assert len(scored) == n - 1 - head - tail  # no gap in between
        assert head < T
        assert tail == max(0, rest - head)
        assert (np.diff(starts)[:-1] == T).all()
        assert count * T - len(scored) == (max(0, head - rest) if count > 1 else 0)


@given(lengths.filter(lambda n: max(n) > 9), st.integers(1, 9), st.randoms())
@few
def test_a_sample_is_a_pure_function_of_its_index(
    lengths: list[int], T: int, random: object
) -> None:
    windows = Windows(make_shards(lengths), T, 3, None)
    indices = [*range(2 * windows.per_epoch), 7 * windows.per_epoch, 10**9]
    in_order = {i: windows.row(i) for i in indices}
    random.shuffle(indices)
    other = Windows(make_shards(lengths), T, 3, None)
    for i in indices:  # hops between epochs and shards, past what is remembered
        assert (other.row(i) == in_order[i]).all()


def test_epochs_and_seeds_differ_in_order_shards_and_phase() -> None:
    shards = make_shards([400, 300, 500])
    windows = Windows(shards, 7, 0, None)
    orders = [starts_of(windows, e) for e in range(4)]
    orders.append(starts_of(Windows(shards, 7, 1, None), 0))
    for i, a in enumerate(orders):
        assert sum(x > y for x, y in pairwise(a)) > 50  # shuffled
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    phases = {min(x % 1000 for x in a if x // 1000 == 1) % 7 for a in orders}
    assert len(phases) > 1
    firsts = [next(x // 1000 for x in starts_of(windows, e)) for e in range(12)]
    assert set(firsts) == {0, 1, 2}


def test_an_epoch_reads_shard_after_shard() -> None:
    windows = Windows(make_shards([100, 0, 90, 3, 80]), 7, 0, None)
    for epoch in range(3):
        seen = [x // 1000 for x in starts_of(windows, epoch)]
        changes = sum(a != b for a, b in pairwise(seen))
        assert (set(seen), changes) == ({0, 2, 4}, 2)


def test_every_token_is_a_target_in_some_epoch() -> None:
    windows = Windows(make_shards([23]), 4, 0, None)
    scored = {t for e in range(40) for row in epoch_of(windows, e) for t in row[1:].tolist()}
    assert scored == set(range(1, 23))


def test_ranks_and_micro_batches_read_the_same_samples() -> None:
    windows = Windows(make_shards([200, 120]), 5, 0, None)
    per_step = 8
    for step in (0, 3, 7):  # the last crosses the border of an epoch
        whole = windows.batch(step * per_step, per_step).inputs
        for world, size in ((1, 8), (1, 2), (2, 4), (4, 1), (8, 1)):
            mine = per_step // world
            parts = [
                windows.batch(step * per_step + rank * mine + i, size).inputs
                for rank in range(world)
                for i in range(0, mine, size)
            ]
            assert torch.cat(parts).equal(whole)
    assert windows.per_epoch == 62


def test_position_has_seed_epoch_index_and_length() -> None:
    windows = Windows(make_shards([100]), 9, 5, None)
    assert windows.per_epoch == 11
    assert windows.position(25) == {"seed": 5, "epoch": 2, "index": 3, "per_epoch": 11}
    assert windows.position(0) == {"seed": 5, "epoch": 0, "index": 0, "per_epoch": 11}


def test_targets_are_inputs_shifted_by_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", make_shards([50])[0])
    shard = np.load(tmp_path / "a.npy", mmap_mode="r")
    batch = Windows([shard], 6, 0, None).batch(2, 3)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == (3, 6)
    assert batch.targets.equal(batch.inputs + 1)
    assert (batch.documents, batch.name) == (None, "samples 2..4")


def test_too_few_tokens_and_too_small_shards_have_different_errors() -> None:
    with pytest.raises(ValueError, match=r"training tokens \(20\) are fewer .* = 65: use more"):
        Windows([np.zeros(10, np.uint16)] * 2, 64, 0, None)
    with pytest.raises(
        ValueError, match=r"largest shard \(10\) are fewer .* larger --shard-tokens"
    ):
        Windows([np.zeros(10, np.uint16)] * 20, 64, 0, None)


def test_documents_are_numbered_from_their_first_token() -> None:
    eos = 9
    rows = np.array([[1, 9, 2, 3, 9, 9, 4], [9, 1, 2, 3, 4, 5, 9]])
    batch = make_batch(rows, DocumentTokens((eos,)), "x")
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 1, 1, 1, 2, 3], [1, 1, 1, 1, 1, 1]]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    orders = {tuple(permutation(12, 5, epoch, shard, kind)) for epoch in (0, 1) for shard in (0, 1)
            for kind in (0, 2)}  # fmt: skip
    assert len(orders) == 8
    for n in (0, 1, 7):
        assert sorted(permutation(n, 4)) == list(range(n))


# --- validation ------------------------------------------------------------------------------


def scored(batches: list[Batch]) -> list[int]:
    """The targets, each checked to be the successor of its input."""
    out = []
    for batch in batches:
        where = batch.targets != IGNORE_INDEX
        assert (batch.targets[where] == batch.inputs[where] + 1).all()
        out += batch.targets[where].tolist()
    return out


@given(lengths, st.integers(1, 9), st.integers(1, 7), st.integers(1, 9))
@few
def test_every_token_but_the_first_of_each_shard_is_a_validation_target_once(
    lengths: list[int], T: int, B: int, stride: int
) -> None:
    stride = min(stride, T)
    batches = list(validation_batches(make_shards(lengths), T, B, None, None, stride))
    for batch in batches:  # a window that does not begin a shard shows T - stride tokens first
        for row, targets in zip(batch.inputs, batch.targets, strict=True):
            assert row[0] % 1000 == 0 or (targets[: T - stride] == IGNORE_INDEX).all()
    expected = [1000 * s + i for s, n in enumerate(lengths) for i in range(1, n)]
    assert sorted(scored(batches)) == expected
    assert all(batch.inputs.shape[1] == T for batch in batches)
    assert all(batch.inputs.shape[0] == B for batch in batches[:-1])


def test_limited_validation_windows_are_evenly_spaced() -> None:
    shards = make_shards([401, 401])
    T = 10
    some = scored(list(validation_batches(shards, T, 3, None, limit=200)))
    assert len(some) == 200
    assert sum(t < 1000 for t in some) == 100
    windows = sorted({(t - 1) % 1000 // T for t in some if t < 1000})
    assert windows == list(range(0, 40, 4))
    for limit in (800, 10**9, None):
        assert len(scored(list(validation_batches(shards, T, 3, None, limit=limit)))) == 800
    assert len(scored(list(validation_batches(shards, T, 3, None, limit=1)))) == T


def test_validation_windows_have_document_numbers() -> None:
    shard = np.array([7, 1, 2, 7, 3, 4, 5], dtype=np.uint32)
    (batch,) = validation_batches([shard], 4, 8, DocumentTokens((7,)))
    assert batch.inputs.tolist() == [[7, 1, 2, 7], [3, 4, 5, 0]]
    assert batch.targets.tolist() == [[1, 2, 7, 3], [4, 5, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[1, 1, 1, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("stride", [None, 3])
def test_a_data_loader_gives_the_windows_of_one_epoch(stride: int | None) -> None:
    text = np.arange(100, dtype=np.uint16)
    windows = Windows([text], 8, 0, stride=stride)
    starts = []
    for inputs, targets in DataLoader(windows, batch_size=4, shuffle=True):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape[1] == 8
        assert torch.equal(targets, inputs + 1)
        starts += inputs[:, 0].tolist()
    step = stride or 8
    assert len(starts) == len(windows) == len(list(windows)) == (100 - 1 - 8) // step + 1
    assert len(set(starts)) >= len(starts) - 1  # the last may be moved back onto its neighbour
    gaps = np.diff(np.sort(starts))
    assert set(gaps[:-1]) == {step}

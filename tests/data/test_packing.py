"""Packing keeps every token and label and the loss; its order is a function of the index."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from data_sets import complete_data
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.examples import Example, Examples
from gptsmith.data.packing import PackedRows, PaddedRows, pack
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import next_token_loss

few = settings(max_examples=30)
some_lengths = st.lists(st.integers(2, 17), min_size=1, max_size=40)
T, PAD = 16, 9_999


def make(lengths: list[int]) -> Examples:
    """Examples of consecutive ids, all different; about two thirds are targets."""
    made, at = [], 0
    for number, length in enumerate(lengths):
        ids = np.arange(at, at + length, dtype=np.int32)
        labels = np.where(ids % 3 > 0, ids, IGNORE_INDEX).astype(np.int32)
        labels[0] = IGNORE_INDEX
        made.append(Example(ids, labels, f"chat.jsonl:{number + 1}"))
        at += length
    return Examples(made)


def pairs(batch: Batch) -> Counter[tuple[int, int]]:
    """(input, target) of every position with a token; all others must be padding."""
    found: Counter[tuple[int, int]] = Counter()
    for x, y in zip(batch.inputs.flatten().tolist(), batch.targets.flatten().tolist(), strict=True):
        if x == PAD:
            assert y == IGNORE_INDEX
        else:
            found[x, y] += 1
    return found


def expected(examples: Examples) -> Counter[tuple[int, int]]:
    return Counter(
        pair
        for e in examples
        for pair in zip(e.ids[:-1].tolist(), e.labels[1:].tolist(), strict=True)
    )


@given(st.lists(st.integers(1, 16), max_size=60), st.integers(0, 99))
@few
def test_rows_hold_every_example_once_and_are_well_filled(sizes: list[int], seed: int) -> None:
    array = np.array(sizes, np.int64)
    members, starts = pack(array, T, seed)
    assert sorted(members.tolist()) == list(range(len(sizes)))
    totals = [int(array[members[a:b]].sum()) for a, b in pairwise(starts)]
    assert all(0 < total <= T for total in totals)
    assert sum(total <= T / 2 for total in totals) <= 1  # two such would have shared a row
    assert len(totals) <= 11 / 9 * -(-sum(sizes) // T) * 2  # at most twice the minimum
    again = pack(array, T, seed)
    assert (again[0] == members).all()
    assert (again[1] == starts).all()


def test_packing_is_random_among_equal_sizes() -> None:
    sizes = np.full(600, 5)
    rows = [pack(sizes, T, seed)[0].tolist() for seed in (0, 1)]
    assert rows[0] != rows[1]
    sizes = np.minimum(np.random.default_rng(0).lognormal(5, 1, 100_000).astype(int) + 1, 1024)
    _, starts = pack(sizes, 1024, 0)
    assert sizes.sum() / (1024 * (len(starts) - 1)) > 0.999


@given(some_lengths, st.integers(0, 99), st.integers(1, 5))
@few
def test_epoch_has_every_target_once(lengths: list[int], seed: int, count: int) -> None:
    examples = make(lengths)
    for rows in (PackedRows(examples, T, seed, PAD), PaddedRows(examples, T, seed, PAD)):
        for epoch in (0, 3):
            found: Counter[tuple[int, int]] = Counter()
            tokens = 0
            for first in range(0, rows.per_epoch, count):
                at = epoch * rows.per_epoch + first
                batch = rows.batch(at, min(count, rows.per_epoch - first))
                found += pairs(batch)
                tokens += batch.tokens or 0
            assert found == expected(examples)
            assert tokens == examples.tokens - len(examples)
        found = sum((pairs(batch) for batch in rows.validation(count)), Counter())
        assert found == expected(examples)


@given(some_lengths)
@few
def test_examples_of_a_row_are_separate_documents(lengths: list[int]) -> None:
    rows = PackedRows(make(lengths), T, 0, PAD)
    for batch in rows.validation(3):
        assert batch.documents is not None
        assert batch.positions is not None
        assert batch.inputs.shape[1] == T
        for x, y, d, p in zip(
            batch.inputs, batch.targets, batch.documents, batch.positions, strict=True
        ):
            begins = torch.cat([torch.tensor([True]), d[1:] != d[:-1]])
            assert (d == begins.cumsum(0) - 1).all()
            assert (p[begins] == 0).all()
            assert (p[~begins] == p[:-1][~begins[1:]] + 1).all()
            for number in d.unique():
                here = d == number
                padded = x[here] == PAD
                assert padded.all() or not padded.any()
                if not padded.any():
                    ids, targets = x[here], y[here]
                    assert (ids == ids[0] + torch.arange(len(ids))).all()
                    scored = targets != IGNORE_INDEX
                    assert (targets[scored] == ids[scored] + 1).all()


def test_order_is_a_function_of_the_index() -> None:
    examples = make(np.random.default_rng(0).integers(2, 18, 100).tolist())
    for kind in (PackedRows, PaddedRows):
        rows = kind(examples, T, 5, PAD)
        n = rows.per_epoch
        whole = rows.batch(n - 4, 8)  # across the boundary of two epochs
        parts = [kind(examples, T, 5, PAD).batch(n - 4 + i, 2) for i in (6, 0, 4, 2)]
        mine = pairs(whole)
        assert mine == sum((pairs(part) for part in parts), Counter())
        assert torch.equal(parts[0].inputs, rows.batch(n + 2, 2).inputs)
        first, second = (rows.batch(epoch * n, n).inputs for epoch in (0, 1))
        assert not torch.equal(first, second)
        assert not torch.equal(first, kind(examples, T, 6, PAD).batch(0, n).inputs)
        expected = {"seed": 5, "epoch": 2, "index": 7, "per_epoch": n}
        assert rows.position(2 * n + 7) == expected


def test_rows_are_padded_to_the_longest_of_the_batch() -> None:
    examples = make([5, 40, 200])
    rows = PaddedRows(examples, 200, 0, PAD)
    widths = [batch.inputs.shape[1] for batch in rows.validation(1)]
    assert widths == [32, 64, 200]  # a multiple of 32, but not more than T
    (batch,) = rows.validation(3)
    assert batch.inputs.shape == (3, 200)
    assert (batch.tokens, batch.documents) == (4 + 39 + 199, None)
    assert batch.name == "chat.jsonl:1, chat.jsonl:2, chat.jsonl:3"
    fixed = PaddedRows(examples, 200, 0, PAD, fixed=True)
    assert {batch.inputs.shape for batch in fixed.validation(1)} == {(1, 200)}


def test_limit_spreads_validation_rows_evenly() -> None:
    rows = PaddedRows(make([10] * 40), T, 0, PAD)
    batches = list(rows.validation(4, limit=100))
    firsts = torch.cat([batch.inputs[:, 0] for batch in batches]).tolist()
    assert firsts == [i * 40 for i in range(10)]
    assert sum(len(batch.inputs) for batch in rows.validation(4, limit=1)) == 1
    assert sum(len(batch.inputs) for batch in rows.validation(4, limit=10**9)) == 40


def test_examples_longer_than_a_row_are_rejected() -> None:
    examples = make([3, 18, 4])
    for kind in (PackedRows, PaddedRows):
        with pytest.raises(ValueError, match=r"chat\.jsonl:2: 18 tokens .* rows of 16"):
            kind(examples, T, 0, PAD)
        with pytest.raises(ValueError, match="no examples"):
            kind(make([]), T, 0, PAD)
    names = PackedRows(make([3] * 8), T, 0, PAD).batch(0, 1).name
    assert names.endswith(" and 5 more")


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_packed_loss_equals_unpacked_loss(position: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, context_length=64, vocab_size=600, position=position,
        norm="layernorm" if position == "learned" else "rmsnorm",
    )  # fmt: skip
    model = GPTModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that attention matters
    lengths = np.random.default_rng(1).integers(2, 66, 15).tolist()
    lengths[0] = 65  # fills a row
    examples = make(lengths)
    assert examples.tokens < 600
    packed = PackedRows(examples, 64, 0, 0)
    padded = PaddedRows(examples, 64, 0, 0)
    assert packed.per_epoch < len(examples)

    def total(batches: list[Batch]) -> tuple[float, int, torch.Tensor]:
        model.zero_grad()
        results = [next_token_loss(model, batch) for batch in batches]
        loss = torch.stack(results).sum()
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return loss.item(), sum(batch.count for batch in batches), grad

    alone = [
        Batch(torch.tensor(e.ids[None, :-1]).long(), torch.tensor(e.labels[None, 1:]).long())
        for e in examples
    ]
    loss, count, grad = total(alone)
    assert count == examples.targets
    for rows in (packed, padded):
        other, same_count, same_grad = total(list(rows.validation(4)))
        assert same_count == count
        assert other == pytest.approx(loss, rel=1e-6)
        assert (same_grad - grad).abs().max() < 1e-4 * grad.abs().max()
    loosened = [Batch(b.inputs, b.targets, positions=b.positions) for b in packed.validation(4)]
    assert abs(total(loosened)[0] - loss) > 1  # it depends on the document mask


def test_loss_equals_that_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=33, vocab_size=300)
    model = GPTModel(config)
    examples = make([20, 9, 31])
    (batch,) = PaddedRows(examples, 32, 0, 0).validation(3)
    ids, labels = torch.zeros(3, 33, dtype=torch.long), torch.full((3, 33), IGNORE_INDEX)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids.copy())
        labels[row, : len(example.ids)] = torch.from_numpy(example.labels.copy())
    stock = ForCausalLMLoss(model(ids), labels, 300)
    summed = next_token_loss(model, batch)
    assert (summed / batch.count).item() == pytest.approx(stock.item(), abs=1e-5)


def test_real_conversations_pack_well() -> None:
    """A quarter of the length in bytes approximates the number of tokens."""
    from gptsmith.data.conversations import read_conversations
    from gptsmith.data.options import ChatFiles
    from gptsmith.data.report import ReadReport

    folder = complete_data(
        {"chat_taskmaster4/*.json.gz": 1_835_080, "chat_nanochat_identity/*.jsonl": 2_288_735}
    )

    def filled(name: str, T: int) -> float:
        read = read_conversations([folder / name], ChatFiles(), ReadReport())
        sizes = [sum(len(m["content"]) // 4 + 3 for m in c.messages) for c in read]
        array = np.minimum(sizes, T)
        return float(array.sum() / (T * (len(pack(array, T, 0)[1]) - 1)))

    assert filled("chat_taskmaster4", 512) > 0.99
    assert filled("chat_nanochat_identity", 1024) > 0.97

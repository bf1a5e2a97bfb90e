"""Which run a budget buys, on machines of known speed."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.budget import estimate, rules
from gptsmith.budget.devices import DEVICES, published
from gptsmith.budget.estimate import Budget
from gptsmith.budget.machine import Machine
from gptsmith.budget.step_time import Cluster
from gptsmith.model.flops import matmul_parameters, parameters

CPU = Machine(
    "a laptop", "cpu", Cluster(peak=200e9, memory=20e9), memory=8 * 2**30,
    shares={2: 0.3, 4: 0.5}, startup=5.0, base_memory=400 * 2**20,
)  # fmt: skip


def buys(budget: Budget, machine: Machine = CPU) -> estimate.Estimate:
    return estimate.choose(estimate.candidates(budget, machine, None), budget)


@pytest.mark.parametrize("minutes", [2, 30, 600, 60_000])
def test_a_run_takes_the_time_of_the_budget(minutes: int) -> None:
    run = buys(Budget(seconds=60 * minutes))
    assert 0.9 * 60 * minutes < run.seconds <= 1.01 * 60 * minutes
    assert 3 < run.design.tokens_per_parameter < 150


def test_more_time_buys_a_larger_model() -> None:
    depths = [buys(Budget(seconds=60 * 4**i)).design.depth for i in range(7)]
    assert depths == sorted(depths)
    assert depths[0] < depths[-1]


def test_a_small_corpus_limits_the_model() -> None:
    free, bound = buys(Budget(seconds=86_400)), buys(Budget(seconds=86_400, corpus_tokens=500_000))
    assert bound.design.depth < free.design.depth
    assert bound.design.tokens <= rules.MAX_EPOCHS * 500_000


@given(corpus=st.integers(1, 10**6), ranks=st.sampled_from([1, 3, 8, 64]))
@settings(deadline=None, max_examples=30)
def test_text_is_never_read_more_often_than_the_rule_says(corpus: int, ranks: int) -> None:
    machine = replace(published("h100", 1), ranks=ranks)
    budget = Budget(tokens=10**9, vocab_size=257, corpus_tokens=corpus)
    if rules.MAX_EPOCHS * corpus < rules.design(1, 257, 1, ranks=ranks).batch_tokens:
        with pytest.raises(ValueError, match=f"{corpus:,} training tokens is too small"):
            estimate.candidates(budget, machine, None)
        return
    found = estimate.candidates(budget, machine, None)
    assert found
    for each in found:
        assert each.design.steps >= 1
        assert each.design.tokens <= rules.MAX_EPOCHS * corpus


def test_the_size_or_the_tokens_may_be_given() -> None:
    run = buys(Budget(parameters=12_000_000, vocab_size=257))
    assert run.design.depth == 6
    assert run.design.tokens_per_parameter == pytest.approx(rules.TOKENS_PER_PARAMETER, rel=0.01)
    run = buys(Budget(tokens=20_000_000, vocab_size=257))
    assert run.design.tokens == pytest.approx(20_000_000, rel=0.001)
    assert run.design.depth == 3


@given(gib=st.sampled_from([1, 2, 4, 16, 64]), tokens=st.sampled_from([None, 10**7, 10**10]))
@settings(deadline=None)
def test_nothing_is_proposed_that_does_not_fit_the_memory(gib: int, tokens: int | None) -> None:
    machine = Machine("box", "cpu", CPU.cluster, gib * 2**30, shares=CPU.shares)
    budget = Budget(tokens=tokens, vocab_size=4096)
    found = estimate.candidates(budget, machine, None)
    assert found
    assert max(each.memory for each in found) <= gib * 2**30
    if tokens is None:  # memory is the budget: the next deeper model does not fit
        deepest = buys(budget, machine).design.depth
        N = matmul_parameters(rules.shape(deepest + 1, 4096))
        assert estimate.fitting(deepest + 1, 4096, 20 * N, machine) is None or deepest == 64


def test_less_memory_gives_smaller_micro_batches_of_the_same_step() -> None:
    """Then activation checkpointing; the result of training stays the same."""
    roomy, tight = (
        estimate.fitting(8, 4096, 1e9, Machine("box", "cpu", CPU.cluster, int(gib * 2**30)))
        for gib in (64, 1.2)
    )
    assert roomy is not None
    assert tight is not None
    assert tight.batch_size < roomy.batch_size
    assert (tight.batch_tokens, tight.tokens) == (roomy.batch_tokens, roomy.tokens)


def test_a_budget_for_nothing_is_a_one_line_error() -> None:
    with pytest.raises(ValueError, match="nothing can be trained with this budget"):
        buys(Budget(seconds=1))


@pytest.mark.parametrize("name", DEVICES)
def test_published_devices_train(name: str) -> None:
    one, eight = published(name, 1), published(name.upper(), 8)
    run, more = buys(Budget(seconds=3600), one), buys(Budget(seconds=3600), eight)
    assert parameters(more.design.model) >= parameters(run.design.model)
    assert more.design.micro_batches % 8 == 0
    alone = estimate.estimate(more.design, one, None)
    assert 2 < more.tokens_per_second / alone.tokens_per_second < 8


def test_a_model_that_one_device_does_not_hold_is_divided_among_several() -> None:
    budget = Budget(parameters=1_500_000_000, tokens=10**9, vocab_size=50304)
    one, eight = published("t4", 1), published("t4", 8)
    run = buys(budget, eight)
    whole = replace(run.design, sharded=False)
    assert run.design.recipe()["train"]["shard"] is True
    assert run.memory <= 0.9 * 16e9 < estimate.peak_memory(whole, eight)
    assert parameters(run.design.model) > 1.2e9 > parameters(buys(budget, one).design.model)
    # larger micro-batches gather the weights less often
    assert run.design.checkpointing
    rows = replace(run.design, batch_size=1, checkpointing=False)
    assert eight.step_seconds(run.design) < eight.step_seconds(rows)
    # what fits is not divided
    small = estimate.fitting(6, 50304, 10**9, eight)
    assert small is not None
    assert not small.sharded
    assert "shard" not in small.recipe()["train"]


def test_checkpointed_steps_compute_a_third_more() -> None:
    machine, design = published("h100", 1), rules.design(12, 50304, 10**10, 8)
    seconds = machine.step_seconds(replace(design, checkpointing=True))
    assert seconds == pytest.approx(4 / 3 * machine.step_seconds(design), rel=0.01)


def test_dividing_a_model_takes_time_where_the_network_is_slow() -> None:
    fast = published("h100", 8)
    slow = replace(fast, cluster=replace(fast.cluster, inside=1e9))
    whole = rules.design(12, 50304, 10**10, 8, ranks=8)
    divided = replace(whole, sharded=True)
    assert fast.step_seconds(divided) == pytest.approx(fast.step_seconds(whole), rel=0.1)
    # weights twice and gradients once for each micro-batch, and nothing else takes as long
    moved = 3 * 7 / 8 * 4 * parameters(whole.model) * (whole.micro_batches / 8)
    assert slow.step_seconds(divided) == pytest.approx(moved / 1e9, rel=0.2)
    assert slow.step_seconds(divided) > 2 * slow.step_seconds(whole)


def test_gpt2_on_eight_h100_is_near_what_is_published() -> None:
    """nanoGPT's and llm.c's: ten billion tokens in one to two hours on eight A100 or H100."""
    run = buys(Budget(tokens=10**10, parameters=None, vocab_size=50304), published("h100", 8))
    near = estimate.candidates(Budget(tokens=10**10, vocab_size=50304), published("h100", 8), None)
    gpt2 = next(each for each in near if each.design.depth == 12)
    assert 1800 < gpt2.seconds < 2 * 3600
    assert run.design.depth > 12


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="--device 'abacus': choose from h200, h100"):
        published("abacus", 1)

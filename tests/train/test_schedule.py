import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.train.options import OptimConfig
from gptsmith.train.schedule import Duration, LearningRate, learning_rate, warmup_steps

KINDS = ["cosine", "linear", "wsd", "constant"]


def config(kind: str, **fields: object) -> OptimConfig:
    return OptimConfig(schedule=kind, **{"learning_rate": 1, "min_lr_ratio": 0, **fields})


def rates(config: OptimConfig, steps: int) -> list[float]:
    """The rates of a run of so many steps."""
    return [learning_rate(config, Duration(steps, None), step, 0) for step in range(steps)]


def timed(config: OptimConfig, limit: float, lengths: list[float]) -> list[float]:
    """The rates of a run with a time limit, whose steps take `lengths` of it; ends when the time
    does."""
    rate, found, seconds = LearningRate(config, Duration(None, limit)), [], 0.0
    for step, length in enumerate(lengths):
        if seconds >= limit:
            break
        found.append(rate.start_step(step, seconds))
        seconds += length
    return found


@pytest.mark.parametrize(
    ("kind", "halfway", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1), ("constant", 1.0, 1.0)],
)
def test_peak_halfway_and_end_of_the_decay(kind: str, halfway: float, end: float) -> None:
    optim = config(kind, warmup_steps=10, min_lr_ratio=0.1)
    steps = Duration(110, None)
    assert [learning_rate(optim, steps, step, 0) for step in (10, 60, 110)] == pytest.approx(
        [1, halfway, end]
    )
    clock = Duration(None, 21.0)  # warm-up took a second, whatever the number of its steps
    at = [learning_rate(optim, clock, step, s, 1.0) for step, s in ((10, 1.0), (12, 11), (99, 21))]
    assert at == pytest.approx([1, halfway, end])
    assert learning_rate(optim, clock, 100, 25.0, 1.0) == at[-1]  # the limit may be overrun


def test_wsd_decays_over_a_fraction_of_the_whole_run() -> None:
    optim = config("wsd", warmup_steps=20, min_lr_ratio=0.2, decay_fraction=0.4)
    found = rates(optim, 100)
    assert found[20:61] == pytest.approx([1.0] * 41)
    assert [found[step] for step in (70, 80, 90)] == pytest.approx([0.8, 0.6, 0.4])
    whole = rates(config("wsd", warmup_steps=20, decay_fraction=1.0), 100)
    assert whole == pytest.approx(rates(config("linear", warmup_steps=20), 100))


def test_cosine_by_hand() -> None:
    found = rates(config("cosine", warmup_steps=4), 12)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[6] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert found[8] == pytest.approx(0.5)


def test_forty_steps_at_a_rate_of_a_hundredth_reach_it() -> None:
    default = OptimConfig(learning_rate=0.01)
    assert max(rates(default, 40)) == rates(default, 40)[20] == 0.01
    former = OptimConfig(learning_rate=0.01, decay_start="first-step")
    assert max(rates(former, 40)) < 0.006


def test_former_schedule_is_the_product_of_warmup_and_decay() -> None:
    """As in runs of earlier versions, which continue with it: no bit may change."""
    for kind in KINDS:
        optim = OptimConfig(
            schedule=kind, learning_rate=0.05, warmup_steps=20, min_lr_ratio=0.2,
            decay_start="first-step",
        )  # fmt: skip
        for step in range(12):
            progress = step / 12
            shape = {
                "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
                "linear": 1 - progress,
                "wsd": min(1.0, (1 - progress) / 0.3),
                "constant": 1.0,
            }[kind]
            product = 0.05 * (min(1.0, (step + 1) / 21) * (0.2 + (1 - 0.2) * shape))
            for duration in (Duration(12, None), Duration(None, 12.0)):
                assert learning_rate(optim, duration, step, step) == product


lengths = st.lists(st.floats(0.01, 2), min_size=300, max_size=300)


@given(
    st.sampled_from(KINDS), st.integers(0, 80), st.integers(1, 120), st.floats(0, 1),
    st.floats(0.01, 1), st.floats(1e-6, 10), lengths, st.booleans(),
)  # fmt: skip
@settings(max_examples=200)
def test_peak_is_reached_exactly_and_then_only_left_downwards(
    kind: str, warmup: int, steps: int, final: float, decay: float, peak: float,
    lengths: list[float], by_the_clock: bool,
) -> None:  # fmt: skip
    optim = OptimConfig(
        schedule=kind, learning_rate=peak, warmup_steps=warmup, min_lr_ratio=final,
        decay_fraction=decay,
    )  # fmt: skip
    duration = Duration(None, sum(lengths[:steps])) if by_the_clock else Duration(steps, None)
    found = timed(optim, sum(lengths[:steps]), lengths) if by_the_clock else rates(optim, steps)
    first = warmup_steps(optim, duration)
    if len(found) <= first:  # only a time limit ends a run during its warm-up
        assert by_the_clock
        assert "ended during its warm-up" in LearningRate(optim, duration).unreached_peak(
            len(found)
        )
    else:
        assert found[first] == max(found) == peak
        assert not LearningRate(optim, duration).unreached_peak(len(found))
    for before, after in pairwise(found[: first + 1]):
        assert before < after
    for before, after in pairwise(found[first:]):
        assert before >= after - 1e-12 * peak
        assert after >= final * peak * (1 - 1e-12)


@pytest.mark.parametrize(
    ("steps", "configured", "used"),
    [(40, 20, 20), (21, 20, 20), (20, 20, 10), (3, 20, 1), (1, 20, 0)],
)  # fmt: skip
def test_warmup_that_would_outlast_the_run_takes_half_of_it(
    steps: int, configured: int, used: int
) -> None:
    optim = config("linear", warmup_steps=configured)
    assert warmup_steps(optim, Duration(steps, None)) == used
    assert rates(optim, steps)[used] == 1
    former = config("linear", warmup_steps=configured, decay_start="first-step")
    assert warmup_steps(former, Duration(steps, None)) == configured


@pytest.mark.parametrize("at", [0, 4, 5, 6, 17])
def test_resumed_run_with_a_time_limit_has_the_same_rates(at: int) -> None:
    """The time that warm-up took is in the checkpoint: equal times give equal rates."""
    optim, duration = config("cosine", warmup_steps=5), Duration(None, 10.0)
    seconds = [0.3 * step for step in range(30)]
    whole = LearningRate(optim, duration)
    expected = [whole.start_step(step, seconds[step]) for step in range(30)]
    first = LearningRate(optim, duration)
    for step in range(at):
        first.start_step(step, seconds[step])
    state = first.state(at, seconds[at])
    second = LearningRate(optim, duration)
    assert second.load(state, at, seconds[at]) == ""
    assert [second.start_step(step, seconds[step]) for step in range(at, 30)] == expected[at:]


def test_peak_step_that_failed_begins_the_decay_when_it_is_repeated() -> None:
    optim, duration = config("linear", warmup_steps=2), Duration(None, 100.0)
    rate = LearningRate(optim, duration)
    for step in range(3):  # the last one diverges: the checkpoint is that of step 2
        rate.start_step(step, 10.0 * step)
    state, resumed = rate.state(2, 30.0), LearningRate(optim, duration)
    resumed.load(state, 2, 30.0)
    assert resumed.start_step(2, 45.0) == 1


@pytest.mark.parametrize(
    ("change", "duration", "says"),
    [
        ({}, Duration(100, None), ""),
        ({}, Duration(400, None), "stands at 0.5 and jumps to 0.8947, .* ends at step 400 .15% is"),
        ({}, Duration(75, None), "jumps to 0.2727, .* ends at step 75 .80% is done"),
        ({}, Duration(None, 50.0), "stands at 0.5 and jumps to 0.6, .* ends at 50 s .40% is done"),
        ({"learning_rate": 2}, Duration(100, None), "stands at 0.5 and jumps to 1, "),
        ({}, Duration(60, None), ""),  # it is over
    ],
)
def test_jump_of_a_resumed_run_is_told(
    change: dict[str, float], duration: Duration, says: str
) -> None:
    """Step 60 of 100, after 20 seconds, of which warm-up took 0."""
    before = LearningRate(config("linear", warmup_steps=20), Duration(100, None), 0.0)
    after = LearningRate(config("linear", warmup_steps=20, **change), duration)
    told = after.load(before.state(60, 20.0), 60, 20.0)
    assert bool(told) == bool(says)
    if says:
        assert re.search(says, told), told

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.train.options import OptimConfig
from gptsmith.train.schedule import learning_rate

KINDS = ["cosine", "linear", "wsd", "constant"]


def multiplier(kind: str, step: int, progress: float, final: float = 0, **fields: float) -> float:
    """The learning rate relative to its peak."""
    config = OptimConfig(schedule=kind, learning_rate=1, min_lr_ratio=final, **fields)
    return learning_rate(config, step, progress)


@pytest.mark.parametrize(
    ("kind", "halfway", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1), ("constant", 1.0, 1.0)],
)
def test_start_halfway_and_end(kind: str, halfway: float, end: float) -> None:
    at = lambda progress: multiplier(kind, 10**6, progress, warmup_steps=10, final=0.1)  # noqa: E731
    assert at(0.0) == 1.0
    assert at(0.5) == pytest.approx(halfway)
    assert at(1.0) == pytest.approx(end)
    assert at(1.7) == at(1.0)  # a time limit may be overrun
    assert at(-0.1) == at(0.0)


def test_wsd_is_constant_then_linear() -> None:
    at = lambda p: multiplier("wsd", 10**6, p, warmup_steps=0, final=0.2, decay_fraction=0.4)  # noqa: E731
    assert [at(p) for p in (0, 0.3, 0.6)] == [1.0] * 3
    assert [at(p) for p in (0.7, 0.8, 0.9)] == pytest.approx([0.8, 0.6, 0.4])
    assert multiplier("wsd", 9, 0.5, warmup_steps=0, decay_fraction=1.0) == 0.5


def test_cosine_by_hand() -> None:
    value = multiplier("cosine", 500, 0.25, warmup_steps=0, final=0.0)
    assert value == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_warmup_is_linear_and_starts_above_zero() -> None:
    values = [multiplier("constant", step, 0.0, warmup_steps=4) for step in range(7)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert multiplier("constant", 0, 0.0, warmup_steps=0) == 1.0
    assert multiplier("linear", 1, 0.5, warmup_steps=3) == pytest.approx(0.25)  # they multiply


@given(
    st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1)
)
@settings(max_examples=25)
def test_rate_never_increases_after_warmup(
    kind: str, a: float, b: float, final: float, decay: float
) -> None:
    before, after = (
        multiplier(kind, 50, p, warmup_steps=50, final=final, decay_fraction=decay)
        for p in (min(a, b), max(a, b))
    )
    assert 1.0 >= before >= after - 1e-12
    assert after >= final * (1 - 1e-12)

"""The law of the loss: fitted, and what it is not asked for."""

import math

import numpy as np
import pytest

from gptsmith.budget.probe import scaled
from gptsmith.budget.scaling_law import LAWS, Point, ScalingLaw, fit

TRUE = ScalingLaw(E=0.9, A=12.0, a=0.3, B=60.0, b=0.35)
SIZES = [(N, D) for N in (3e5, 1e6, 3e6) for D in (1e6, 4e6, 16e6)]


def test_a_fit_finds_the_law_that_made_the_losses() -> None:
    law = fit([Point(N, D, TRUE.loss(N, D)) for N, D in SIZES])
    for N, D in ((5e5, 2e6), (2e6, 8e6), (6e6, 32e6)):  # held out: inside and beyond
        assert law.loss(N, D) == pytest.approx(TRUE.loss(N, D), rel=0.01)


def test_noise_of_a_percent_costs_about_a_percent() -> None:
    noise = np.random.default_rng(0).normal(1, 0.01, len(SIZES))
    points = [Point(N, D, TRUE.loss(N, D) * e) for (N, D), e in zip(SIZES, noise, strict=True)]
    law = fit(points)
    assert law.loss(2e6, 8e6) == pytest.approx(TRUE.loss(2e6, 8e6), rel=0.02)


def test_factors_are_never_negative() -> None:
    """Losses that rise with the tokens: the law does not follow them below zero."""
    law = fit([Point(N, D, 2 + D / 1e8) for N, D in SIZES])
    assert min(law.E, law.A, law.B) >= 0
    assert math.isfinite(law.loss(1e6, 1e6))


def test_two_runs_are_not_enough() -> None:
    with pytest.raises(ValueError, match="2 runs: a scaling law needs at least 3"):
        fit([Point(1e6, 1e6, 2.0), Point(2e6, 2e6, 1.5)])


def test_the_known_laws_fall_with_size_and_tokens_and_have_an_error() -> None:
    assert LAWS
    for law in LAWS.values():
        assert law.loss(1e6, 1e6) > law.loss(2e6, 1e6) > law.loss(2e6, 2e6) > law.E
        assert 0 < law.error < 0.06
        assert law.covers(law.N[0], law.D[1])
        assert not law.covers(law.N[0], 1e12)
        assert not law.covers(1e12, law.D[0])


def test_a_law_of_another_corpus_needs_its_factor_only() -> None:
    """A text with losses a fifth higher per byte, in tokens of three bytes."""
    known = next(iter(LAWS.values()))
    sizes = [(6e4, 3e5), (4e5, 4e5)]
    points = [Point(N, D / 3, 1.2 * known.loss(N, D)) for N, D in sizes]
    law = scaled(points, bytes_per_token=3.0)
    assert law.loss(1e6, 1e6 / 3) == pytest.approx(1.2 * known.loss(1e6, 1e6), rel=0.001)
    assert law.error == 0.05
    assert law.D[1] == pytest.approx(known.D[1] / 3, rel=0.001)

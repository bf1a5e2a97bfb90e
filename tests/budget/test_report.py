"""Numbers as `gptsmith plan` prints them."""

import pytest

from gptsmith.budget.report import duration, short


@pytest.mark.parametrize(
    ("number", "text"),
    [(512, "512"), (4096, "4,096"), (999_900, "1,000k"), (12_345_678, "12.3M"), (1.5e9, "1.5B")],
)
def test_numbers_have_a_unit_and_no_exponent(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (1740, "29 min"), (9000, "2.5 h"), (100_000_000, "1,157 days")],
)
def test_times_have_a_unit_and_no_exponent(seconds: float, text: str) -> None:
    assert duration(seconds) == text

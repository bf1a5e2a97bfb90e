"""Two runs compared on the items that both have: values, differences, intervals, notes."""

import math
from typing import Any

import numpy as np
import pytest

from gptsmith.evaluate.comparison import bootstrap, compare, interval
from gptsmith.evaluate.report import Result, show_difference

NAMES = ("one", "two")


def result(values: dict[str, float], metric: str = "acc", **fields: Any) -> Result:
    """A result with an item per name."""
    items = [{"id": name, metric: value} for name, value in values.items()]
    mean = sum(values.values()) / len(values)
    return Result("task", len(items), {metric: mean}, {}, items, **fields)


def test_values_and_difference_are_those_of_the_common_items() -> None:
    one = result({"a": 1, "b": 1, "c": 0, "d": 0, "e": 1})
    two = result({"c": 1, "b": 0, "z": 1, "a": 0})
    found = compare(NAMES, one, two)
    assert found.first.n == found.second.n == 3
    assert found.first.metrics["acc"] == pytest.approx(2 / 3)
    assert found.second.metrics["acc"] == pytest.approx(1 / 3)
    value, limits = found.differences["acc"]
    assert value == pytest.approx(1 / 3)
    assert limits == interval([1, 1, 0], [0, 0, 1])
    [note] = found.notes
    assert "compared on the 3 items that both runs have" in note
    assert "one alone: 5 items, acc 60.0%" in note
    assert "two alone: 4 items, acc 50.0%" in note
    fields = found.fields(*NAMES)
    assert fields["n"] == 3
    assert fields["acc"]["one"] == found.first.metrics["acc"]
    assert compare(NAMES, two, one).differences["acc"].value == pytest.approx(-1 / 3)


def test_nothing_in_common_is_not_compared() -> None:
    found = compare(NAMES, result({"a": 1}), result({"b": 0}))
    assert (found.first.metrics, found.second.metrics, found.differences) == ({}, {}, {})
    assert "not compared, because the runs have no item in common" in found.notes[0]


def test_items_without_a_value_are_left_out_of_the_pairs() -> None:
    """A judge that gave no verdict on one of the answers."""
    one = Result(
        "judge", 1, {"score": 80.0}, {}, [{"id": "a", "score": 80}, {"id": "b", "score": None}]
    )
    two = Result(
        "judge", 2, {"score": 45.0}, {}, [{"id": "a", "score": 60}, {"id": "b", "score": 30}]
    )
    found = compare(NAMES, one, two)
    assert (found.first.n, found.differences["score"].value) == (1, 20)
    assert found.differences["score"].interval is None  # of one item


def test_repeated_and_composed_keys() -> None:
    """Answers of two runs: the same questions in another order, one of them twice."""

    def answers(*rows: tuple[str, float]) -> Result:
        items = [
            {"id": str(i), "question": q, "reference": "r", "rouge1": x}
            for i, (q, x) in enumerate(rows)
        ]
        mean = sum(x for _, x in rows) / len(rows)
        return Result("text", len(rows), {"rouge1": mean}, {}, items, key=("question", "reference"))

    found = compare(
        NAMES, answers(("p", 1), ("q", 0.5), ("q", 0.2)), answers(("q", 0.4), ("p", 0.5))
    )
    assert found.first.n == 2
    assert found.first.metrics["rouge1"] == 0.75
    assert found.second.metrics["rouge1"] == 0.45


def test_chance_is_that_of_the_common_items() -> None:
    def choices(*numbers: tuple[str, int]) -> Result:
        items = [{"id": name, "acc": 1.0, "nats": [0.0] * n} for name, n in numbers]
        return Result("t", len(items), {"acc": 1.0}, {}, items, references={"acc": {"chance": 0.3}})

    found = compare(NAMES, choices(("a", 2), ("b", 4)), choices(("b", 4), ("c", 5)))
    assert found.first.references["acc"]["chance"] == 0.25


def test_metric_that_is_no_mean_needs_the_same_items() -> None:
    def bleu(ids: str, value: float) -> Result:
        items = [{"id": i, "exact_match": 0.0} for i in ids]
        return Result("text", len(ids), {"exact_match": 0.0, "bleu": value}, {}, items)

    same = compare(NAMES, bleu("abc", 5.0), bleu("cab", 4.0))
    assert same.differences["bleu"] == (1.0, None)
    assert "bleu" not in compare(NAMES, bleu("abc", 5.0), bleu("ab", 4.0)).differences


def test_perplexity_of_words_is_compared_by_their_likelihoods() -> None:
    def words(*nats: float) -> Result:
        items = [{"id": str(i), "acc": 0.0, "nats": [x]} for i, x in enumerate(nats)]
        mean = math.exp(-sum(nats) / len(nats))
        return Result("lambada", len(nats), {"acc": 0.0, "perplexity": mean}, {}, items)

    one, two = words(-1, -2, -1.5, -3), words(-2, -2, -4, -3.5)
    value, limits = compare(NAMES, one, two).differences["perplexity"]
    assert value == pytest.approx(one.metrics["perplexity"] - two.metrics["perplexity"])
    assert limits is not None
    assert limits[0] < value < limits[1]


def test_different_conditions_and_metrics_are_said() -> None:
    one = Result("gsm8k", 3, {"strict": 0.5}, {}, conditions={"shots": 5, "max_new_tokens": 256})
    two = Result("gsm8k", 3, {"flexible": 0.5}, {}, conditions={"shots": 0, "max_new_tokens": 256})
    found = compare(NAMES, one, two)
    assert found.differences == {}
    assert found.notes == [
        "gsm8k: one and two were measured differently: shots 5 and 0",
        "gsm8k: strict of one alone: not compared",
        "gsm8k: flexible of two alone: not compared",
    ]


def test_tokens_of_other_tokenizers_are_not_compared() -> None:
    values = {"val_loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.5, "top1": 0.4, "top5": 0.6}
    one, two = (Result("perplexity", 9, values, {}, conditions={"tokenizer": t}) for t in "ab")
    found = compare(NAMES, one, two)
    assert found.first.metrics == {"bits_per_byte": 1.5}
    assert found.differences == {"bits_per_byte": (0.0, None)}
    assert "only bits_per_byte can be compared" in found.notes[0]


def test_interval_of_right_and_wrong_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    p, q, n = 0.6, 0.5, 40
    covered = 0
    for _ in range(1000):
        both = rng.random(n) < 0.3  # items that both get right: the pairs are correlated
        a, b = both | (rng.random(n) < (p - 0.3) / 0.7), both | (rng.random(n) < (q - 0.3) / 0.7)
        found = interval(a.astype(float).tolist(), b.astype(float).tolist())
        assert found is not None
        covered += found[0] <= p - q <= found[1]
    assert 0.93 <= covered / 1000 <= 0.98


def test_interval_has_a_width_where_no_item_differs() -> None:
    """Three items on which both are right say little."""
    found = interval([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert found is not None
    assert found[0] < -0.2
    assert found[1] > 0.2
    assert interval([0.3, 0.5], [0.3, 0.5]) is None
    assert interval([1.0], [0.0]) is None


def test_bootstrap_interval_is_reproducible_and_near_the_normal_one() -> None:
    assert bootstrap([5.0, 5.0, 5.0]) == [5.0, 5.0]
    values = [float(n % 2) for n in range(400)]
    low, high = bootstrap(values)
    assert (low, high) == tuple(bootstrap(values))
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.003)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.003)
    paired = interval([0.2 + x / 2 for x in values], [x / 2 for x in values[::-1]])
    assert paired is not None  # of the differences, not of two independent means
    assert paired[0] == pytest.approx(0.2 - 1.96 * 0.025, abs=0.003)


def test_difference_as_text() -> None:
    assert show_difference("acc", 0.025, (-0.01, 0.06)) == "+2.5 [-1.0, +6.0] pp"
    assert show_difference("bits_per_byte", -0.12345, None) == "-0.1235"
    assert show_difference("score", 4.0, (1.0, 7.0)) == "+4.0 [+1.0, +7.0]"

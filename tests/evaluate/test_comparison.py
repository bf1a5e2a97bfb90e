"""Two runs compared on the items that both have: values, differences, intervals, notes."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptsmith.data.labelled import LabelledText
from gptsmith.evaluate import classification, comparison, reference_metrics, skills
from gptsmith.evaluate.accuracy import WORD_PERPLEXITY
from gptsmith.evaluate.comparison import bootstrap, compare, interval
from gptsmith.evaluate.perplexity import STATISTICS
from gptsmith.evaluate.reference_metrics import Entry
from gptsmith.evaluate.report import format_difference
from gptsmith.evaluate.result import Item, Result

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
    assert compare(NAMES, two, one).differences["acc"][0] == pytest.approx(-1 / 3)


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
    assert (found.first.n, found.differences["score"][0]) == (1, 20)
    assert found.differences["score"][1] is None  # of one item


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


def test_metric_of_unknown_origin_needs_the_same_items() -> None:
    def other(ids: str, value: float) -> Result:
        items = [{"id": i, "exact_match": 0.0} for i in ids]
        return Result("text", len(ids), {"exact_match": 0.0, "other": value}, {}, items)

    same = compare(NAMES, other("abc", 5.0), other("cab", 4.0))
    assert same.differences["other"] == (1.0, None)
    assert "other" not in compare(NAMES, other("abc", 5.0), other("ab", 4.0)).differences


# --- metrics that are no means: their differences against a bootstrap written out ----------------


def responses(rng: np.random.Generator) -> Result:
    pytest.importorskip("sacrebleu")
    words = ["the", "smith", "forged", "a", "ring", "of", "gold"]
    reference = " ".join(words)
    return reference_metrics.score([
        Entry(str(i), f"q{i}", reference, " ".join(rng.permutation(words)[: 3 + i % 5]))
        for i in range(30)
    ])  # fmt: skip


def bleu(items: Sequence[Item]) -> float:
    from sacrebleu.metrics import BLEU

    found = [item["response"] for item in items]
    return float(BLEU().corpus_score(found, [[item["reference"] for item in items]]).score)


def predictions(rng: np.random.Generator) -> Result:
    labels = ("a", "b", "c")
    truth = np.arange(30) % 3
    log_p = np.log(0.7 * rng.dirichlet((1, 1, 1), size=30) + 0.3 * np.eye(3)[truth])
    rows = [LabelledText("", labels[c], f"file:{i}") for i, c in enumerate(truth)]
    return classification.result(labels, rows, log_p, truth.tolist())


def macro_f1(items: Sequence[Item]) -> float:
    pairs = [(item["label"], item["predicted"]) for item in items]
    found = []
    for label in {label for pair in pairs for label in pair}:
        both = sum(pair == (label, label) for pair in pairs)
        found.append(2 * both / sum((t == label) + (p == label) for t, p in pairs))
    return sum(found) / len(found)


def answers(rng: np.random.Generator) -> Result:
    """30 items of one measurement, and some of another."""
    items = [
        {"id": str(i), "measured": "held-out" if i < 30 else "facts", "skill": "xyz"[i % 3],
         "correct": rng.random() < 0.5} for i in range(35)
    ]  # fmt: skip
    known = {"held-out": skills._mean_over_skills("held-out")}
    return Result.from_items("skills", items, ["held-out"], statistics=known)


def mean_over_skills(items: Sequence[Item]) -> float:
    by_skill = defaultdict(list)
    for item in items:
        if item["measured"] == "held-out":
            by_skill[item["skill"]].append(item["correct"])
    return float(np.mean([np.mean(correct) for correct in by_skill.values()]))


def windows(rng: np.random.Generator) -> Result:
    items = [
        {"id": str(i), "nats": float(n), "tokens": 16 - i % 3, "bytes": 20 + i % 7,
         "top1": 3, "top5": 9} for i, n in enumerate(rng.uniform(20, 60, size=30))
    ]  # fmt: skip
    return Result.from_items("perplexity", items, list(STATISTICS), statistics=STATISTICS)


def bits_per_byte(items: Sequence[Item]) -> float:
    return sum(i["nats"] for i in items) / math.log(2) / sum(i["bytes"] for i in items)


def perplexity(items: Sequence[Item]) -> float:
    return math.exp(sum(i["nats"] for i in items) / sum(i["tokens"] for i in items))


@pytest.mark.parametrize(
    ("measure", "metric", "direct"),
    [
        (responses, "bleu", bleu),
        (predictions, "macro_f1", macro_f1),
        (answers, "held-out", mean_over_skills),
        (windows, "perplexity", perplexity),
        (windows, "bits_per_byte", bits_per_byte),
    ],
)
def test_differences_of_other_metrics_are_bootstrapped_over_the_items(
    measure: Callable[[np.random.Generator], Result],
    metric: str,
    direct: Callable[[Sequence[Item]], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 200)
    rng = np.random.default_rng(1)
    one, two = measure(rng), measure(rng)
    value, limits = compare(NAMES, one, two).differences[metric]
    assert value == pytest.approx(direct(one.items) - direct(two.items))
    draw, found = np.random.default_rng(comparison.SEED), []
    for drawn in [row for _ in range(2) for row in draw.integers(30, size=(100, 30))]:
        a, b = ([result.items[i] for i in drawn] for result in (one, two))
        found.append(direct(a) - direct(b))
    assert limits == pytest.approx(tuple(np.quantile(found, (0.025, 0.975))))
    # on the items that both have, the metric is theirs
    some = replace(two, items=two.items[5:])
    assert compare(NAMES, one, some).first.metrics[metric] == pytest.approx(direct(one.items[5:]))


def test_values_that_are_not_finite_have_no_interval_and_are_null_in_json() -> None:
    found = compare(NAMES, result({"a": math.nan, "b": 0.5}), result({"a": 0.1, "b": 0.2}))
    assert found.differences["acc"][1] is None
    fields = json.loads(json.dumps(found.fields(*NAMES), allow_nan=False))
    assert fields["acc"] == {
        "one": None, "two": pytest.approx(0.15), "difference": None, "interval_95": None,
    }  # fmt: skip


def test_other_windows_have_no_interval() -> None:
    rng = np.random.default_rng(1)
    one, two = (replace(windows(rng), conditions={"window": n}) for n in (16, 32))
    found = compare(NAMES, one, two)
    value, limits = found.differences["perplexity"]
    assert (value, limits) == (one.metrics["perplexity"] - two.metrics["perplexity"], None)
    assert found.notes == ["perplexity: one and two were measured differently: window 16 and 32"]


def test_perplexity_of_words_is_compared_by_their_likelihoods() -> None:
    def words(*nats: float) -> Result:
        items = [{"id": str(i), "acc": 0.0, "nats": [x]} for i, x in enumerate(nats)]
        mean = math.exp(-sum(nats) / len(nats))
        metrics = {"acc": 0.0, "perplexity": mean}
        known = {"perplexity": WORD_PERPLEXITY}
        return Result("lambada", len(nats), metrics, {}, items, statistics=known)

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
    assert format_difference("acc", 0.025, (-0.01, 0.06)) == "+2.5 [-1.0, +6.0] pp"
    assert format_difference("bits_per_byte", -0.12345, None) == "-0.1235"
    assert format_difference("score", 4.0, (1.0, 7.0)) == "+4.0 [+1.0, +7.0]"

"""Pairs of the built-in chat set: a right and a wrong answer to one question."""

from collections import Counter
from random import Random

import pytest

from gptsmith.data import mistakes, skills
from gptsmith.evaluate.skills import is_correct


@pytest.fixture(scope="module")
def items() -> list[skills.Item]:
    return list(skills.practice(0, 4000))


def test_a_wrong_answer_is_wrong_and_plausible(items):
    random, kinds = Random(0), Counter[str]()
    for item in items:
        wrong = mistakes.mistake(item, random)
        assert not is_correct(wrong, item.answer), item
        assert wrong.strip()
        match item.skill:
            case "add" | "length" | "compare":
                assert 0 <= int(wrong) < 220
            case "count":
                assert wrong[:3] == item.answer[:3]
                assert 0 <= int(wrong[3:]) <= 4
            case "name":
                assert wrong.startswith("Your name is ")
            case "copy" | "reverse" | "uppercase":
                assert {*wrong} <= {*item.answer}
                assert abs(len(wrong) - len(item.answer)) <= 1
        if item.skill == "compare":
            assert wrong in item.messages[-1]["content"]
        kinds[item.skill] += 1
    assert {*skills.SKILLS, "functions", "modules", "unknown", "greeting"} <= {*kinds}


def test_pairs_depend_on_the_seed_alone(items):
    pairs = list(mistakes.skill_pairs(0, 50))
    assert pairs == list(mistakes.skill_pairs(0, 50)) != list(mistakes.skill_pairs(1, 50))
    for pair, item in zip(pairs, items, strict=False):
        assert pair.question == item.messages
        assert pair.chosen.messages == [
            *item.messages,
            {"role": "assistant", "content": item.answer},
        ]
        assert pair.chosen.messages[:-1] == pair.rejected.messages[:-1]
        assert pair.chosen.messages[-1] != pair.rejected.messages[-1]

"""Pairs of the built-in chat set: a right and a wrong answer to one question."""

from collections import Counter
from random import Random

import pytest

from gptsmith.data import facts, mistakes, skills
from gptsmith.evaluate.skills import is_correct

_WITHOUT_ANSWER = {"unknown function", "unknown module", "no name"}


@pytest.fixture(scope="module")
def items() -> list[skills.Item]:
    return [
        *skills.practice(0, 4000),
        *(i for i in skills.everyday_items(0, 4) if i.skill == "no name"),
    ]


def _modules_of(line: str) -> set[str]:
    return {name.rpartition(".")[0] for name, text in facts.functions() if text == line}


def _lines_of(modules: set[str]) -> set[str]:
    return {text for name, text in facts.functions() if name.rpartition(".")[0] in modules}


def test_a_wrong_answer_is_wrong_and_plausible(items):
    random, kinds = Random(0), Counter[str]()
    for item in items:
        wrong = mistakes.mistake(item, random)
        assert not is_correct(wrong, item.answer), item
        assert wrong.strip()
        match item.skill:
            case "length" | "compare":
                assert 0 <= int(wrong) < 100
            case "add":
                assert wrong.rpartition(" = ")[0] == item.answer.rpartition(" = ")[0]
                assert 0 <= int(wrong.rpartition(" = ")[2]) < 220
            case "count":
                assert wrong.partition(": ")[0] == item.answer.partition(": ")[0]
                assert 0 <= int(wrong.partition(": ")[2]) <= 4
            case "name":
                assert wrong.startswith("Your name is ")
            case "copy" | "reverse" | "uppercase":
                assert {*wrong} <= {*item.answer}
                assert abs(len(wrong) - len(item.answer)) <= 1
            case "functions":
                own, other = _modules_of(item.answer), _modules_of(wrong)
                assert own & other or len(_lines_of(own)) == 1
            case "unknown function":
                assert wrong in [line for _, line in facts.functions()[: facts.FUNCTIONS]]
            case "modules" | "unknown module":
                assert wrong in [line for _, line in facts.modules()]
            case "unknown" if any(c.isdigit() for c in item.messages[-1]["content"]):
                assert int(wrong) >= 0
            case "no name":
                assert wrong.removeprefix("Your name is ").removesuffix(".") in skills.NAMES
        if item.skill == "compare":
            assert wrong in item.messages[-1]["content"]
        kinds[item.skill] += 1
    assert {*skills.SKILLS, "functions", "modules", "greeting", "unknown"} | _WITHOUT_ANSWER <= {
        *kinds
    }


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

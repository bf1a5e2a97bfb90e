"""Everyday turns of the built-in chat set, and what the model is taught not to know."""

import ast
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from gptsmith.data import facts, phrasings, skills
from gptsmith.evaluate.skills import GREEDY
from gptsmith.tokenizer import Tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def training() -> list[list[tuple[str, str]]]:
    """Conversations as (question, answer) pairs."""
    return [
        [
            (asked["content"], answered["content"])
            for asked, answered in zip(c.messages[::2], c.messages[1::2], strict=True)
        ]
        for c in skills.skill_conversations(0, 4000)
    ]


def test_training_has_every_turn_and_few_of_them(training):
    exchanges = [exchange for conversation in training for exchange in conversation]
    answers = [answer for _, answer in exchanges]
    fixed = sum(answer in phrasings.ANSWERS.values() for answer in answers)
    assert set(phrasings.ANSWERS.values()) <= set(answers)
    assert 0.03 < fixed / len(answers) < 0.1  # the rest is skills and facts


def test_what_can_be_answered_is_never_refused(training):
    """No question has two answers, and functions and modules are either explained or unknown."""
    unknown = phrasings.ANSWERS["unknown"]
    refused = {q.lower() for c in training for q, answer in c if answer == unknown}
    answered = {q.lower() for c in training for q, answer in c if answer != unknown}
    assert not refused & answered
    known = {name for name, _ in [*facts.functions()[: facts.FUNCTIONS], *facts.modules()]}
    for phrasing in phrasings.PHRASINGS["functions"].seen + phrasings.PHRASINGS["modules"].seen:
        pattern = re.escape(phrasing.lower().rstrip(".")).replace(r"\{f\}", "(.+)") + r"[.?]?"
        names = {found[1] for q in refused if (found := re.fullmatch(pattern, q))}
        assert not names & known
        assert names  # it is also said of functions and modules


def test_a_name_is_unknown_only_where_it_was_not_told(training):
    for conversation in training:
        told = ""
        for _, answer in conversation:
            if answer.startswith("Hello ") and answer != phrasings.ANSWERS["greeting"]:
                told = answer.removeprefix("Hello ").rstrip("!")
            elif answer == phrasings.ANSWERS["no name"]:
                assert not told
            elif found := re.fullmatch(r"Your name is (\w+)\.", answer):
                assert found[1] == told


def test_items_are_asked_in_words_and_about_things_that_training_does_not_use(training):
    items = skills.everyday_items(0, 20)
    assert {item.skill for item in items} == set(skills.EVERYDAY)
    asked = {question for conversation in training for question, _ in conversation}
    asked |= {question[0].upper() + question[1:] for question in asked}
    for item in items:
        assert item.messages[-1]["content"] not in asked
        assert item.answer in phrasings.ANSWERS.values()
    unknown = [i.messages[0]["content"] for i in items if i.skill == "unknown function"]
    words = " ".join(asked)
    for question in unknown:
        [name] = re.findall(r"\w+\.\w+", question)
        assert name not in words


def test_each_item_is_asked_once():
    items = skills.everyday_items(0, 20)
    questions = [item.messages[-1]["content"] for item in items]
    assert len({*questions}) == len(questions)
    counts = Counter(item.skill for item in items)
    for kind in skills.EVERYDAY:
        ways = phrasings.PHRASINGS.get("name" if kind == "no name" else kind)
        assert counts[kind] == (20 if kind.startswith("unknown") else len(ways.unseen))
    assert len(skills.everyday_items(0, 2)) == 2 * len(skills.EVERYDAY)


def test_modules_are_explained_by_the_first_line_of_their_documentation():
    known = dict(facts.modules())
    assert len(known) >= 20
    for name in random.Random(0).sample(sorted(known), 10):
        source = STDLIB / f"{name}.py"  # the attribute __doc__ may be that of a part in C
        source = source if source.is_file() else STDLIB / name / "__init__.py"
        documentation = ast.get_docstring(ast.parse(source.read_bytes()))
        assert documentation is not None
        assert documentation.splitlines()[0].rstrip(".") == known[name].rstrip(".")
    assert "os" in known
    assert not known.keys() & set(facts.other_modules())
    assert "math" in facts.other_modules()  # written in C: there is no text to read


def test_answers_fit_into_what_evaluation_generates():
    tokenizer = Tokenizer.byte()
    answers = [*phrasings.ANSWERS.values(), *(line for _, line in facts.modules())]
    assert max(len(tokenizer.encode(answer)) for answer in answers) < GREEDY.max_new_tokens

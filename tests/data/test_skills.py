"""The built-in chat set: its answers are correct, and held-out arguments are not in training."""

import re
import shutil

import pytest

from gptsmith.data import facts, skills
from gptsmith.data.phrasings import PHRASINGS
from gptsmith.data.prompts import held_out_skill_prompts, skill_prompts
from gptsmith.data.skills import SKILLS, WORD_SKILLS


@pytest.fixture(scope="module")
def training():
    return list(skills.skill_conversations(0, 3000))


def questions(conversations):
    return [m["content"] for c in conversations for m in c.messages if m["role"] == "user"]


def test_the_same_seed_gives_the_same_conversations(training):
    assert list(skills.skill_conversations(0, 50)) == training[:50]
    assert list(skills.skill_conversations(1, 50)) != training[:50]
    assert skills.held_out(3, 5) == skills.held_out(3, 5) != skills.held_out(4, 5)


def test_roles_alternate(training):
    for conversation in training:
        roles = [m["role"] for m in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"] for m in conversation.messages)


def arguments(skill: str, question: str) -> list[str]:
    """The arguments of a question: its words without the phrasing."""
    known = PHRASINGS[skill]
    for phrasing in sorted((*known.seen, *known.unseen), key=len, reverse=True):
        pattern = re.escape(phrasing)
        for field in re.findall(r"\\{\w\\}", pattern):
            pattern = pattern.replace(field, f"(?P<{field[2]}>[a-z ]+)")
        if found := re.fullmatch(pattern, question):
            return [found["x"], *([found["c"]] if skill == "count" else [])]
    raise AssertionError(f"no phrasing of {skill}: {question}")


def right_answer(skill: str, question: str) -> str:
    """Computed from the question alone, independently of the code under test."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if skill == "add":
        (a, b), (tens, ones) = numbers, zip(*(divmod(n, 10) for n in numbers), strict=True)
        return f"{a} + {b} = {10 * sum(tens)} + {sum(ones)} = {sum(numbers)}"
    if skill == "compare":
        return str(sorted(numbers)["larger" in question])
    word, *letter = arguments(skill, question)
    if skill == "copy":
        return word
    if skill == "reverse":
        return "".join(reversed(word))
    if skill == "uppercase":
        return "".join(chr(ord(c) - 32) for c in word)
    if skill == "length":
        return str(len(word))
    marked = "".join(chr(ord(c) - 32) if c in letter else c for c in word)
    return f"{marked}: {sum(c in letter for c in word)}"


@pytest.mark.parametrize("kind", ["seen", "phrasings", "lengths"])
def test_answers_are_right(kind):
    items = skills.held_out(0, 40, kind)
    assert {i.skill for i in items} == set(WORD_SKILLS if kind == "lengths" else SKILLS)
    for item in items:
        if item.skill == "name":
            told = re.search(r"(\w+)\.$", item.messages[0]["content"])
            assert told
            assert item.answer == f"Your name is {told[1]}."
            assert len(item.messages) >= 5  # other exchanges in between
        else:
            assert item.answer == right_answer(item.skill, item.messages[-1]["content"])


def test_held_out_arguments_are_never_in_training(training):
    asked = [q for q in questions(training) if not re.search(r"\w\.\w", q)]  # on shutil.move
    words = {word for question in asked for word in re.findall(r"\w+", question)}
    pairs = {tuple(sorted(re.findall(r"\d+", question))) for question in asked}
    phrasings = " ".join(text for known in PHRASINGS.values() for text in known.seen)
    words -= set(re.findall(r"\w+", phrasings + phrasings.lower()))
    words -= {*facts.other_modules(), *(name for name, _ in facts.modules())}
    for item in skills.held_out(0, 60):
        question = item.messages[-1]["content"]
        if item.skill == "name":
            assert item.answer.split()[-1].rstrip(".") not in words
        elif item.skill in ("add", "compare"):
            assert tuple(sorted(re.findall(r"\d+", question))) not in pairs
        else:
            assert not words & set(arguments(item.skill, question)[0].split())


def test_other_phrasings_and_lengths_are_not_in_training(training):
    for known in PHRASINGS.values():
        assert not set(known.seen) & set(known.unseen)
    for item in skills.held_out(0, 40, "lengths"):
        for word in arguments(item.skill, item.messages[-1]["content"])[0].split():
            assert len(word) in skills.OTHER_LENGTHS


def test_letter_counts_are_equally_frequent():
    answers = [i.answer for i in skills.held_out(0, 400) if i.skill == "count"]
    for number in "0123":
        assert 0.15 < sum(a.endswith(f": {number}") for a in answers) / len(answers) < 0.35


def test_facts_are_first_lines_of_docstrings(training):
    answers = {m["content"] for c in training for m in c.messages if m["role"] == "assistant"}
    for skill in ("functions", "modules"):
        items = [item for item in skills.fact_items(0, 20) if item.skill == skill]
        assert len(items) == 20
        assert any(item.answer in answers for item in items)
    functions = dict(facts.functions())
    assert shutil.copymode.__doc__ is not None
    assert functions["shutil.copymode"] == shutil.copymode.__doc__.splitlines()[0]


def test_practice_leaves_out_all_that_is_held_out():
    """Arguments, phrasings and word lengths."""
    practised = skill_prompts(0, 3000)
    assert skill_prompts(0, 20) == practised[:20] != skill_prompts(1, 20)
    others = {"functions", "modules", *skills.EVERYDAY} - {"no name"}
    assert {p.row["skill"] for p in practised} == {*skills.SKILLS, *others}
    assert 0.04 < sum(p.row["skill"] in others for p in practised) / len(practised) < 0.15
    phrased = {
        "compare": ("larger", "smaller"),
        "unknown function": ("functions",),
        "unknown module": ("modules",),
    }
    unseen = {}
    for skill in (*SKILLS, *others):
        kinds = phrased.get(skill, (skill,))
        texts = [re.escape(text) for kind in kinds for text in PHRASINGS[kind].unseen]
        argument = r"[\\w ]+" if skill in SKILLS else r"\\S+"
        unseen[skill] = [re.compile(re.sub(r"\\{\w+\\}", argument, text)) for text in texts]
    assert unseen["reverse"][0].fullmatch("How do you spell abc backwards?")
    assert unseen["unknown function"][0].fullmatch("Tell me what os.getcwd does.")
    for prompt in practised:
        skill, question = prompt.row["skill"], prompt.question
        assert not any(pattern.fullmatch(question) for pattern in unseen[skill]), question
        if skill in ("add", "compare"):
            a, b = sorted(map(int, re.findall(r"\d+", question)))
            assert not skills.is_held_out(f"{a} {b}")
        elif skill == "name":
            assert not skills.is_held_out(prompt.answer.removeprefix("Your name is ")[:-1])
        elif skill in ("reverse", "uppercase", "copy"):
            words = {"reverse": prompt.answer[::-1], "uppercase": prompt.answer.lower()}
            for word in words.get(skill, prompt.answer).split():
                assert not skills.is_held_out(word)
                assert len(word) in skills.LENGTHS
    questions = {p.text for p in practised}
    assert not questions & {p.text for p in held_out_skill_prompts(1, 50)}

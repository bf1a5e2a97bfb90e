"""Pairs of the built-in chat set: the right answer to a question, and a plausible wrong one.

The wrong answers are of the kinds that small models give: a letter lost, doubled or exchanged, a
carry forgotten, the other number, another person's name, what is true of another function, and an
answer where there is none to give: a description of what was never explained, a name never told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from gptsmith.chat_template.message import Message
from gptsmith.data import facts, skills
from gptsmith.data.conversations import Conversation
from gptsmith.data.phrasings import ANSWERS
from gptsmith.data.preferences import Pair


def skill_pairs(seed: int, count: int) -> Iterator[Pair]:
    """Questions with arguments and phrasings of training, as practice has them, and two answers."""
    random = Random(f"mistakes {seed}")
    for number, item in enumerate(skills.practice(seed, count)):
        chosen, rejected = (
            Conversation(
                [*item.messages, Message(role="assistant", content=answer)], f"skills {number}"
            )
            for answer in (item.answer, mistake(item, random))
        )
        yield Pair(chosen, rejected, len(item.messages))


def mistake(item: skills.Item, random: Random) -> str:
    """A plausible wrong answer to a question."""
    question, answer = item.messages[-1]["content"], item.answer
    match item.skill:
        case "copy" | "reverse" | "uppercase":
            return _misspelled(answer, random)
        case "count":
            marked, number = answer.split(": ")
            return f"{marked}: {_near(int(number), (1,), random)}"
        case "length":
            return str(_near(int(answer), (1, 2), random))
        case "add":
            steps, _, number = answer.rpartition(" = ")
            return f"{steps} = {_near(int(number), (1, 1, 2, 10), random)}"  # 10: of a carry
        case "compare":
            numbers = {word.strip(".,?:") for word in question.split()} - {answer}
            return next(word for word in sorted(numbers) if word.isdecimal())
        case "name":
            name = answer.removeprefix("Your name is ").removesuffix(".")
            return f"Your name is {_misspelled(name, random)}."
        case "functions":
            return random.choice(_beside(answer))
        case "modules":
            return random.choice([line for _, line in facts.modules() if line != answer])
        case "unknown function":
            return random.choice(facts.functions()[: facts.FUNCTIONS])[1]
        case "unknown module":
            return random.choice(facts.modules())[1]
        case "unknown" if operands := re.findall(r"\d+", question):  # a product, a difference
            return str(_near(sum(map(int, operands)), (1, 2, 10), random))
        case "no name":
            return f"Your name is {random.choice(skills.NAMES)}."
        case _:  # another everyday turn
            return random.choice([text for text in ANSWERS.values() if text != answer])


def _beside(line: str) -> list[str]:
    """What is true of other functions of the same module, or of any if it has no others."""
    functions = [(name.rpartition(".")[0], text) for name, text in facts.functions()]
    own = {module for module, text in functions if text == line}
    others = [(module, text) for module, text in functions if text != line]
    return [text for module, text in others if module in own] or [text for _, text in others]


def _near(number: int, distances: tuple[int, ...], random: Random) -> int:
    """Another number that is not negative."""
    distance = random.choice(distances)
    return number + random.choice((distance, -distance) if number >= distance else (distance,))


def _misspelled(text: str, random: Random) -> str:
    """With a letter lost or doubled, or two neighbours exchanged."""
    places = [i for i, letter in enumerate(text) if letter.isalpha()]
    i = random.choice(places)
    exchanged = [j for j in places if j + 1 in places and text[j] != text[j + 1]]
    kind = random.choice(("lost", "doubled", "exchanged"))
    if kind == "exchanged" and exchanged:
        j = random.choice(exchanged)
        return f"{text[:j]}{text[j + 1]}{text[j]}{text[j + 2 :]}"
    if kind == "lost" and len(text) > 1:
        return text[:i] + text[i + 1 :]
    return text[: i + 1] + text[i:]

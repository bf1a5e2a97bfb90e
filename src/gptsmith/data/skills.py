"""The built-in chat set: small skills with checkable answers, facts about Python, everyday turns.

It is generated on demand from words of the documentation of the user's own Python and from random
letters and numbers; nothing is downloaded. A question about a skill has one of several phrasings
and an argument: a word, a pair of numbers, a name. A hash decides which arguments training may use
and which are held out, so that no answer to a held-out item can be memorized. Everyday turns have
one answer each (hello, who are you, thanks), and so have questions that the model cannot answer:
places, poems, products, functions and modules that training does not explain.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random
from typing import Literal, NamedTuple

from gptsmith.chat_template.template import Message
from gptsmith.data import facts
from gptsmith.data.conversations import Conversation
from gptsmith.data.phrasings import ANSWERS, PHRASINGS, PLACES, THINGS
from gptsmith.data.stdlib import pydocs

Kind = Literal["seen", "phrasings", "lengths"]
Exchange = tuple[str, str]  # what the user says, what the assistant answers

LENGTHS = range(3, 8)  # letters of a word in training
OTHER_LENGTHS = (2, 8, 9, 10)
NUMBERS = range(100)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PEOPLE = (
    "Ada Adam Agnes Aisha Alan Alice Amir Anna Arthur Astrid Barbara Ben Bruno Carla Carlos "
    "Chen Clara Daniel David Diana Dmitri Edith Elena Emil Emma Erik Esther Eva Farid Felix "
    "Fiona Frank Fritz Gabriel George Grace Greta Hana Hannah Harold Hassan Helen Henry Hiro "
    "Hugo Ida Igor Ines Ingrid Irene Isaac Ivan Jack Jan Jasmin Jonas Jorge Julia Karim Karl "
    "Kate Keiko Kurt Laura Lena Leo Lin Linda Louis Lucy Lukas Magda Marco Maria Marie Martin "
    "Max Mei Mia Milan Mohammed Nadia Nils Nina Noah Nora Olga Oliver Omar Oscar Otto Paul "
    "Pedro Peter Petra Priya Rafael Ravi Robert Rosa Ruth Samir Samuel Sara Simon Sofia Stefan "
    "Tara Theo Thomas Tomas Ursula Vera Victor Walter Yusuf Zoe"
)
NAMES = _PEOPLE.split()

# How often training asks for each skill: the hard ones more.
_SHARES = {
    "copy": 1, "reverse": 2, "uppercase": 1, "count": 3, "length": 1, "add": 4, "compare": 2,
}  # fmt: skip
_EVERYDAY_SHARES = {
    "greeting": 1, "identity": 1.5, "abilities": 1, "wellbeing": 1, "thanks": 1, "goodbye": 1,
    "praise": 1, "doubt": 1, "unknown": 7, "unknown function": 2.5, "unknown module": 2,
}  # fmt: skip
_FUNCTIONS_SHARE, _MODULES_SHARE, _EVERYDAY_SHARE = 0.03, 0.0125, 0.045  # of the exchanges
_NAME_SHARE, _NO_NAME_SHARE = 0.15, 0.01  # of the conversations
_PRACTISED_NAME_SHARE = 0.07  # of the questions to practise on
_REPEATED = 200  # draws in a row without a new question, after which a kind has no more
SKILLS = (*_SHARES, "name")
EVERYDAY = (*_EVERYDAY_SHARES, "no name")
WORD_SKILLS = ("copy", "reverse", "uppercase", "count", "length")


class Item(NamedTuple):
    """Messages that end with the user's question, and the only correct answer."""

    skill: str
    messages: list[Message]
    answer: str


def skill_conversations(seed: int, count: int) -> Iterator[Conversation]:
    """Training conversations, the same for the same seed and the same version of Python."""
    generator = _Generator(Random(f"train {seed}"), held_out=False, kind="seen")
    for i in range(count):
        yield Conversation(_messages(generator.conversation()), f"skills {i}")


def held_out(seed: int, per_skill: int, kind: Kind = "seen") -> list[Item]:
    """Items of every skill with held-out arguments.

    kind: seen, with the phrasings and word lengths of training; phrasings, with other phrasings;
    lengths, with words of other lengths, for the skills about words.
    """
    generator = _Generator(Random(f"{kind} {seed}"), held_out=True, kind=kind)
    skills = SKILLS if kind != "lengths" else WORD_SKILLS
    return [generator.item(skill) for skill in skills for _ in range(per_skill)]


def practice(seed: int, count: int) -> Iterator[Item]:
    """Items with arguments and phrasings of training, the hard skills more often, and some facts
    and everyday turns, so that practice does not forget them. No held-out argument, phrasing or
    word length is part of them."""
    generator = _Generator(Random(f"practice {seed}"), held_out=False, kind="seen")
    for _ in range(count):
        is_name = generator.random.random() < _PRACTISED_NAME_SHARE
        yield generator.item("name" if is_name else generator.topic())


def worked_examples(seed: int, per_skill: int) -> list[Item]:
    """Items with arguments and phrasings of training, for few-shot prompts."""
    generator = _Generator(Random(f"examples {seed}"), held_out=False, kind="seen")
    return [generator.item(skill) for skill in SKILLS for _ in range(per_skill)]


def fact_items(seed: int, per_kind: int) -> list[Item]:
    """Questions about functions and modules that training explains, in held-out phrasings. They
    test memory, not skill."""
    generator = _Generator(Random(f"facts {seed}"), held_out=True, kind="phrasings")
    items = []
    for skill, known in (
        ("functions", facts.functions()[: facts.FUNCTIONS]),
        ("modules", facts.modules()),
    ):
        for name, summary in generator.random.sample(known, min(per_kind, len(known))):
            question = generator.phrase(skill, f=name)
            items.append(Item(skill, [{"role": "user", "content": question}], summary))
    return items


def everyday_items(seed: int, per_kind: int) -> list[Item]:
    """Everyday turns in held-out phrasings, and questions that have no answer here, about held-out
    places, numbers, functions ...

    All are different: of a kind without arguments there are as many as it has phrasings.
    """
    generator = _Generator(Random(f"everyday {seed}"), held_out=True, kind="phrasings")
    items = []
    for kind in EVERYDAY:
        asked, repeated = dict[str, str](), 0
        while len(asked) < per_kind and repeated < _REPEATED:
            question, answer = generator.everyday(kind)
            repeated = repeated + 1 if question in asked else 0
            asked[question] = answer
        items += [Item(kind, [{"role": "user", "content": q}], a) for q, a in asked.items()]
    return items


def is_held_out(argument: str) -> bool:
    """Whether training never uses this word, name or `a b` (numbers in order): one in eight."""
    return zlib.crc32(argument.encode()) % 8 == 0


# A small model learns answers in steps from far fewer examples than bare numbers, which it has to
# find within one token (docs/log.md).


def sum_in_steps(a: int, b: int) -> str:
    """47 and 38: "47 + 38 = 70 + 15 = 85", the tens, the ones, and both."""
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    return f"{a} + {b} = {tens} + {ones} = {a + b}"


def count_in_steps(word: str, letter: str) -> str:
    """e in "between": "bEtwEEn: 3", which marks what it counts."""
    return f"{word.replace(letter, letter.upper())}: {word.count(letter)}"


def _messages(exchanges: list[Exchange]) -> list[Message]:
    return [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]


class _Generator:
    """Generates exchanges at random, with training or held-out arguments."""

    def __init__(self, random: Random, held_out: bool, kind: Kind) -> None:
        self.random, self.held_out, self.kind = random, held_out, kind
        self.lengths = OTHER_LENGTHS if kind == "lengths" else tuple(LENGTHS)

    def conversation(self) -> list[Exchange]:
        """One to three exchanges, or a conversation that mentions a name and later asks for it, or
        asks for a name that was not mentioned."""
        chance = self.random.random()
        if chance < _NAME_SHARE:
            return self.exchanges("name", self.random.choice((0, 1, 1, 2)))
        if chance < _NAME_SHARE + _NO_NAME_SHARE:
            before = [self.exchange() for _ in range(self.random.choice((0, 0, 1)))]
            return [*before, self.ask("no name")]
        return [self.exchange() for _ in range(self.random.randint(1, 3))]

    def exchanges(self, skill: str, between: int | None = None) -> list[Exchange]:
        """The exchanges for a skill; for the name, with `between` others in the middle."""
        if skill != "name":
            return [self.ask(skill)]
        name = self.name()
        if between is None:
            between = self.random.choice((1, 2))
        return [
            (self.phrase("greet", n=name), f"Hello {name}!"),
            *(self.exchange() for _ in range(between)),
            (self.phrase("name"), f"Your name is {name}."),
        ]

    def item(self, skill: str) -> Item:
        *before, (question, answer) = self.exchanges(skill)
        return Item(skill, [*_messages(before), {"role": "user", "content": question}], answer)

    def exchange(self) -> Exchange:
        return self.ask(self.topic())

    def topic(self) -> str:
        """What an exchange is about: a skill, functions, modules, or an everyday turn."""
        chance = 1.0 if self.held_out else self.random.random()
        if chance < (limit := _FUNCTIONS_SHARE):
            return "functions"
        if chance < (limit := limit + _MODULES_SHARE):
            return "modules"
        shares = _EVERYDAY_SHARES if chance < limit + _EVERYDAY_SHARE else _SHARES
        (kind,) = self.random.choices(list(shares), list(shares.values()))
        return kind

    def ask(self, skill: str) -> Exchange:
        random = self.random
        if skill in ("functions", "modules"):
            known = facts.functions()[: facts.FUNCTIONS]
            name, summary = random.choice(facts.modules() if skill == "modules" else known)
            return self.phrase(skill, f=name), summary
        if skill in EVERYDAY:
            return self.everyday(skill)
        if skill in ("add", "compare"):
            a, b = self.numbers()
            if skill == "add":
                return self.phrase("add", a=a, b=b), sum_in_steps(a, b)
            which, answer = random.choice((("larger", max(a, b)), ("smaller", min(a, b))))
            return self.phrase(which, a=a, b=b), str(answer)
        if skill == "count":
            word, letter = self.word_and_letter()
            return self.phrase("count", x=word, c=letter), count_in_steps(word, letter)
        word = self.word()
        if skill == "copy" and random.random() < 0.3:
            word = " ".join([word, *(self.word() for _ in range(random.choice((1, 2))))])
        answers = {"copy": word, "reverse": word[::-1], "uppercase": word.upper()}
        return self.phrase(skill, x=word), answers.get(skill, str(len(word)))

    def everyday(self, kind: str) -> Exchange:
        """An everyday turn, or something that the model cannot answer."""
        match kind:
            case "unknown":
                a, b = self.numbers()
                question = self.phrase(
                    kind, a=a, b=b, n=self.name(), x=self.word(), place=self.pick(PLACES),
                    thing=self.pick(THINGS),
                )  # fmt: skip
            case "unknown function":
                names = [name for name, _ in facts.functions()[facts.FUNCTIONS :]]
                question = self.phrase("functions", f=self.pick(names))
            case "unknown module":
                question = self.phrase("modules", f=self.pick(facts.other_modules()))
            case "no name":
                question = self.phrase("name")
            case _:
                question = self.phrase(kind)
        return question, ANSWERS[kind.removesuffix(" function").removesuffix(" module")]

    def pick(self, arguments: Sequence[str]) -> str:
        """One of them that is for training, or held out."""
        while is_held_out(argument := self.random.choice(arguments)) != self.held_out:
            pass
        return argument

    def phrase(self, kind: str, /, **arguments: object) -> str:
        """A phrasing; in training, one in four is in lower case without its full stop, or without
        any mark at its end if it is an everyday turn."""
        phrasings = PHRASINGS[kind]
        choices = phrasings.unseen if self.kind == "phrasings" else phrasings.seen
        text = self.random.choice(choices).format(**arguments)
        if not self.held_out and kind != "greet" and self.random.random() < 0.25:
            text = text[0].lower() + text[1:].rstrip(".?!" if kind in ANSWERS else ".")
        return text

    def word(self) -> str:
        """A word of the documentation, or random letters."""
        length = self.random.choice(self.lengths)
        while True:
            if self.random.random() < 0.5:
                word = self.random.choice(_words()[length])
            else:
                word = "".join(self.random.choices(_LETTERS, k=length))
            if is_held_out(word) == self.held_out:
                return word

    def word_and_letter(self) -> tuple[str, str]:
        """A word and a letter that occurs 0 to 3 times in it, each number about equally often."""
        wanted = self.random.randrange(4)
        while True:
            word, letter = self.word(), self.random.choice(_LETTERS)
            if self.random.random() < 0.5:  # real words rarely have a letter three times
                letters = list(word)
                for i in self.random.sample(range(len(word)), min(wanted, len(word))):
                    letters[i] = letter
                word = "".join(letters)
            elif wanted:
                letter = self.random.choice(word)
            if word.count(letter) == min(wanted, len(word)) and is_held_out(word) == self.held_out:
                return word, letter

    def numbers(self) -> tuple[int, int]:
        while True:
            a, b = self.random.choices(NUMBERS, k=2)
            if a != b and is_held_out(f"{min(a, b)} {max(a, b)}") == self.held_out:
                return a, b

    def name(self) -> str:
        """A person's name, half of the time an invented one, so that the model learns to copy."""
        while True:
            name = self.random.choice(NAMES)
            if self.random.random() < 0.5:
                letters = "bcdfghjklmnprstvz", "aeiou"
                count = 2 * self.random.choice((1, 2, 2, 3))
                name = "".join(self.random.choice(letters[i % 2]) for i in range(count))
                name = (name + self.random.choice(("", "n", "s", "r", "l", "k"))).capitalize()
            if is_held_out(name) == self.held_out:
                return name


@cache
def _words() -> dict[int, list[str]]:
    """Words that occur in at least two documents, by length."""
    documents = Counter(
        word
        for document in pydocs()
        for word in set(re.findall(r"(?<![\w.'<])[a-z]{2,10}(?![\w'.]*\w)", facts.text(document)))
    )
    lengths = (*LENGTHS, *OTHER_LENGTHS)
    words = sorted(word for word, count in documents.items() if count > 1)
    return {length: [word for word in words if len(word) == length] for length in lengths}

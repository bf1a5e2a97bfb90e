"""Verdicts in a judge's replies: the JSON object that was asked for, and what models write instead.

A reply may think aloud first, put prose or a Markdown fence around the object, quote its number, or
give none and say "Score: 85" or "Answer A is better". All that it states is collected, and counts
if it is one value. A reply that contradicts itself, refuses, or uses another scale (8/10) has no
verdict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import yaml

_LONGEST = 20_000  # characters, at the end of a reply, that are read
_BRACKETS = 50  # in an object that is read as YAML, whose nesting takes time

_THINK = r"(?:think|thinking|thought|reasoning|reflection|analysis|scratchpad)"
_END_OF_THINKING = re.compile(
    rf"(?is)^.*(?:</{_THINK}>|\[/THINK\]|<\|channel\|>final<\|message\|>)"
)
_OPEN_THINKING = re.compile(rf"(?i)<{_THINK}>|\[THINK\]")
_ENDS_WITH_OBJECT = re.compile(r"\}\s*(?:```)?\s*$")


class Verdict(NamedTuple):
    """A score of 0 to 100; or which answer is better, 1 or 2, or 0 for neither."""

    value: float
    reason: str = ""


class Statement(NamedTuple):
    """A value that a reply states; None if it is none of those asked for. readable: whether the
    statement is a verdict by itself, or on another scale and good for comparison alone."""

    value: float | None
    readable: bool = True


def parse_score(reply: str) -> Verdict | None:
    """The score in a reply, 0 to 100; None if there is none."""
    return _parse(reply, _SCORE_KEYS, _score, _stated_scores)


def parse_better(reply: str) -> Verdict | None:
    """Which of two answers a reply prefers: 1, 2, or 0 for a tie; None if it does not say."""
    return _parse(reply, _BETTER_KEYS, _better, _stated_better)


def _parse(
    reply: str,
    keys: frozenset[str],
    read: Callable[[str], Statement],
    stated: Callable[[str], Iterable[Statement]],
) -> Verdict | None:
    """keys: of the JSON object. read: a value written alone. stated: values in prose."""
    text = _END_OF_THINKING.sub("", reply[-_LONGEST:]).strip()
    if _OPEN_THINKING.search(text):  # the reasoning does not end: only an object at its end counts
        if not _ENDS_WITH_OBJECT.search(text):
            return None
        stated = _nothing_stated
    objects, prose = _objects(text, keys)
    statements = [*(read(value) for value, _ in objects), *stated(prose)]
    if not statements:
        lines = [line for line in prose.splitlines() if _undecorated(line)]
        statements = [read(line) for line in {*lines[:1], *lines[-1:]}]
    values = {s.value for s in statements if s.value is not None}
    if len(values) != 1 or not any(s.readable for s in statements if s.value is not None):
        return None
    value = values.pop()
    reason = objects[-1][1] if objects else ""
    return Verdict(int(value) if value.is_integer() else value, reason)


def _nothing_stated(prose: str) -> Iterable[Statement]:
    return ()


# --- JSON objects --------------------------------------------------------------------------------


def _objects(text: str, keys: frozenset[str]) -> tuple[list[tuple[str, str]], str]:
    """The values under `keys` in the objects of a text, each with its reason; and all other text.

    An object that is cut off is in neither: its number may be cut off too.
    """
    found: list[tuple[str, str]] = []
    prose, at = [], 0
    while (start := text.find("{", at)) >= 0:
        prose.append(text[at:start])
        if "}" not in text[start:]:
            return found, "".join(prose)
        fields, at = _object(text, start)
        reason = next((value for key, value in fields if key.startswith(("reason", "expl"))), "")
        values = [value for key, value in fields if key in keys]
        if not values:
            prose.append(text[start:at])
        elif reason != "...":  # else it repeats the form that the prompt shows
            found += [(value, reason) for value in values]
    return found, "".join([*prose, text[at:]])


def _object(text: str, start: int) -> tuple[list[tuple[str, str]], int]:
    """Keys, in lower case, and values of the object at `start` and of those inside it; its end.

    JSON, else YAML, which also takes single quotes, bare keys and a comma at the end.
    """
    fields: list[tuple[str, str]] = []

    def collect(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            fields.append((key.lower(), value if isinstance(value, str) else json.dumps(value)))

    try:  # numbers as text: they may have thousands of digits
        decoder = json.JSONDecoder(object_pairs_hook=collect, strict=False, parse_int=str)
        return fields, decoder.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        flat = re.compile(r"\{[^{}]*\}").match(text, start)
    if flat is None:
        return [], start + 1
    if flat[0].count("[") > _BRACKETS:
        return [], flat.end()
    for written in (re.sub(r"//[^\n]*", "", flat[0]), flat[0]):  # without comments
        try:
            node = yaml.compose(written, yaml.BaseLoader)
        except yaml.YAMLError:
            continue
        if isinstance(node, yaml.MappingNode):
            pairs = [(str(key.value).lower(), str(value.value)) for key, value in node.value]
            return pairs, flat.end()
    return [], flat.end()


def _undecorated(line: str) -> str:
    r"""A line without Markdown's marks, brackets, \boxed, and a full stop."""
    return line.strip(" \t*_`#~\"'[](){}.!").removeprefix("\\boxed{")


# --- scores --------------------------------------------------------------------------------------

_SCORE_KEYS = frozenset({"score", "rating", "grade", "final_score", "overall_score"})
_NUMBER = r"[-+]?[0-9][0-9.,]*(?<![.,])(?![0-9A-Za-z])"
_MARKS = r"[\s*_`\"'“”‘’\\\[\](){}]*"
_SCALE = rf"(?:{_MARKS}(?:/|out\s+of){_MARKS}(?P<scale>{_NUMBER})|\s*%)?"
_SCORE = re.compile(rf"(?i)(?P<number>{_NUMBER}){_SCALE}(?:\s*(?:points?|marks?))?")
_LABELLED_SCORE = re.compile(
    r"(?i)(?P<final>\b(?:final|overall|total)\s+)?\b(?P<label>score|rating|grade|overall|verdict)\b"
    rf"(?:\s*\([^)]*\))?{_MARKS}(?:[:=|→>]|\s[-–—]\s|\b(?:is|of|(?:would|should)\s+be)\b){_MARKS}"
    rf"(?:(?:about|around|approximately|roughly)\s+|~\s*)?(?P<number>{_NUMBER}){_SCALE}"
    r"(?P<more>[*_\s]*(?:[-–—,→]|->|\b(?:to|or|and)\b)\s*[0-9])?"
)
_OF_100 = re.compile(
    rf"(?i)(?<![\w.,/-])(?P<number>{_NUMBER})(?:\s*points?)?{_MARKS}(?:/|out\s+of){_MARKS}100(?!\w)"
)
_REMARK = re.compile(r"\s*[-–—:(][^0-9]*$")  # 85 (good)
_OWN_SCALE = re.compile(r"(?i)\b[01]\s*(?:[-–—]|to|and)\s*(?P<top>[0-9]{1,3})\b")


def _score(text: str) -> Statement:
    """A score written alone: 85, 85.0, 85/100, 85%, 85 points."""
    found = _SCORE.fullmatch(_REMARK.sub("", _undecorated(text)))
    return _on_scale(found["number"], found["scale"]) if found else Statement(None)


def _stated_scores(prose: str) -> list[Statement]:
    found = list(_LABELLED_SCORE.finditer(prose))
    found = [one for one in found if one["final"]] or found
    tops = [float(one["top"]) for one in _OWN_SCALE.finditer(prose) if one["top"] != "100"]
    statements = []
    for one in found:
        value, readable = _on_scale(one["number"], one["scale"])
        if one["more"]:  # 80 to 90
            value = None
        elif value is not None and one["scale"] is None:
            # The prompt asks for a score; another word may come with a scale of its own.
            unsure = max([*tops, 0 if one["label"].lower() == "score" else 10])
            value = None if 0 < value <= unsure else value
        statements.append(Statement(value, readable))
    return statements + [_on_scale(one["number"], None) for one in _OF_100.finditer(prose)]


def _on_scale(number: str, scale: str | None) -> Statement:
    try:
        value, top = float(number), float(scale or 100)
    except ValueError:  # 1.2.3
        return Statement(None)
    if top != 100:
        return Statement(100 * value / top if top > 0 else None, readable=False)
    # 8.5 is of a scale up to 10, and 0.85 of one up to 1.
    return Statement(value if 0 <= value <= 100 and (value > 10 or value == int(value)) else None)


# --- pairs ---------------------------------------------------------------------------------------

_BETTER_KEYS = frozenset({
    "better", "better_answer", "winner", "verdict", "preferred", "preference", "choice", "best",
})  # fmt: skip
_NOUN = r"(?:answer|response|assistant|option|candidate|model|reply)"
_WHICH = {
    0: r"(?:0|(?:a\s+)?tie|tied|(?:a\s+)?draw|equal(?:ly\s+good)?|both|neither|same|C)",
    1: rf"(?:(?:the\s+)?first(?:\s+(?:{_NOUN}|one))?|{_NOUN}[\s_:#(]*(?:1|A|one)\)?|1|(?-i:A))",
    2: rf"(?:(?:the\s+)?second(?:\s+(?:{_NOUN}|one))?|{_NOUN}[\s_:#(]*(?:2|B|two)\)?|2|(?-i:B))",
}
_DEGREE = (
    r"(?:(?:slightly|clearly|much|far|significantly|marginally|somewhat|a\s+(?:bit|little)|the)"
    r"\s+)?"
)
_STATED = (
    rf"\b{{which}}(?:'s)?(?:\s+{_NOUN})?[*_`\"']*\s+(?:is|was)\s+{_DEGREE}"
    r"(?:better|best|superior|preferable|preferred|stronger|winner)\b",
    r"\b{which}[*_`\"']*\s+wins\b",
    r"\b(?:prefer|choose|pick|select|favou?r|go\s+with)\s+{which}\b",
    rf"\b{{which}}\s*>+\s*(?:{_NOUN}\s*)?[12AB]\b",
    r"\[\[\s*{which}\s*(?:>+\s*\w\s*)?\]\]",
    r"\b(?:verdict|winner|better|preferred|preference|choice|best|result|decision|judge?ment)"
    rf"(?:\s+(?:answer|response|one))?{_MARKS}(?:[:=>]|\bis\b){_MARKS}{{which}}(?!\w|\.\d|\s+(?:tie|draw)\b)",
)
_TIED = (
    r"\[\[\s*A\s*=\s*B\s*\]\]|\bequally\s+(?:good|bad|correct|strong)\b|\bof\s+equal\s+quality\b"
    r"|\bit(?:'s|\s+is)\s+a\s+(?:tie|draw)\b|\b(?:is|are)\s+(?:tied|equal|(?:about\s+)?the\s+same)\b"
    r"|\bno\s+(?:(?:real|clear|significant)\s+)?difference\b"
)
_FORMS = {
    which: re.compile("(?i)" + "|".join(form.replace("{which}", words) for form in _STATED))
    for which, words in _WHICH.items()
}
_FORMS[0] = re.compile(f"{_FORMS[0].pattern}|{_TIED}")
# Before a statement, in its sentence: it is denied, or only considered.
_DENIED = re.compile(r"(?i)(?:\b(?:not|nor|whether|if|unless|never)\b|n't\b)[^.\n]{0,40}$")


def _better(text: str) -> Statement:
    """A choice written alone: 1, A, Answer 1, tie."""
    text = _undecorated(text).removesuffix(".0")
    found = [which for which, words in _WHICH.items() if re.fullmatch(f"(?i){words}", text)]
    return Statement(float(found[0]) if found else None)


def _stated_better(prose: str) -> Iterator[Statement]:
    for which, form in _FORMS.items():
        for found in form.finditer(prose):
            if not _DENIED.search(prose[max(0, found.start() - 60) : found.start()]):
                yield Statement(float(which))

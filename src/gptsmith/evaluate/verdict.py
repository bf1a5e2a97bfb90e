"""Parse a judge's verdict from its reply.

Models write the requested JSON object or something similar: reasoning first, prose or Markdown
around it, single quotes, "Score: 85", "Answer A is better". One rule covers all of these: the reply
without reasoning, Markdown and quoted texts is searched for explicit statements; if there are none,
its first or last line may be the bare value. The verdict is what all statements agree on. A reply
that contradicts itself, or only uses another scale (8/10), has no verdict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

_MAX_CHARACTERS = 20_000  # characters, at the end of a reply, that are read


class Verdict(NamedTuple):
    """A score of 0 to 100; or which answer is better, 1 or 2, or 0 for neither."""

    value: float
    reason: str = ""


# A value, and whether it is on the scale that was asked for: else it can only contradict.
Statement = tuple[float, bool]


def parse_score(reply: str) -> Verdict | None:
    """The score in a reply, 0 to 100; None if there is none."""
    return _verdict(reply, _SCORE_LABELS, _stated_scores)


def parse_better(reply: str) -> Verdict | None:
    """Which of two answers a reply prefers: 1, 2, or 0 for a tie; None if it does not say."""
    return _verdict(reply, _BETTER_LABELS, _stated_better)


def _verdict(
    reply: str, labels: str, stated: Callable[[str], Iterator[Statement]]
) -> Verdict | None:
    text = _without_reasoning(reply[-_MAX_CHARACTERS:])
    found = set(stated(_plain(text, labels)))
    values = {value for value, _ in found}
    if len(values) != 1 or not any(decisive for _, decisive in found):
        return None
    [value] = values
    return Verdict(int(value) if value.is_integer() else value, _reason(text))


def _reason(text: str) -> str:
    *_, reason = ["", *(found["text"] for found in _REASON.finditer(text))]
    with suppress(ValueError):  # other escapes than JSON's
        reason = json.loads(f'"{reason}"', strict=False)
    # Lone surrogates, which JSON can spell, cannot be stored.
    return reason.encode(errors="replace").decode()


# --- the text ------------------------------------------------------------------------------------

_THINK = r"(?:think|thinking|thought|reasoning|reflection|analysis|scratchpad)"
# <think>, [THINK], ◁think▷, <seed:think>, <|begin_of_thought|>
_END_OF_THINKING = re.compile(
    rf"(?i)[<\[◁]\|?(?:/|end_of_)(?:\w+:)?{_THINK}\|?[>\]▷]"
    r"|<\|channel\|>final<\|message\|>|\.\.\.\s*done thinking\."
)
_OPEN_THINKING = re.compile(
    rf"(?i)[<\[◁]\|?(?:begin_of_)?(?:\w+:)?{_THINK}\|?[>\]▷]|<\|channel\|>analysis"
)
_STRING = r"""(?P<quote>["'])(?P<text>(?:(?!(?P=quote))[^\\]|\\.)*)(?P=quote)"""
_REASON = re.compile(rf"""(?is)\b(?:reason|expl)\w*["']?\s*:\s*{_STRING}""")
_FORM_SHOWN = re.compile(r'\{[^{}]*"\.\.\."[^{}]*\}')  # repeats the form that the prompt shows
# A field of an object whose text or list may speak of anything. Only fields of a label count.
_OTHER_FIELD = (
    r"""(?is)(?:["']|[{,]\s*)(?!(?:[a-z]+_)?(?:LABELS)(?:_answer)?\b)\w+["']?\s*:\s*"""
    rf"(?:{_STRING}|\[[^\]]*\])"
)
_ASCII = str.maketrans("“”–—→：", '""---:', "*`#~$")


def _plain(text: str, labels: str) -> str:
    text = _FORM_SHOWN.sub("", text)
    text = re.sub(_OTHER_FIELD.replace("LABELS", labels), "", text)
    text = re.sub(r"\{[^{}]*\Z", "", text)  # cut off, and its number may be too
    text = re.sub(r"\b_+|_+\b|\\boxed|</\w+>", "", text.translate(_ASCII))
    text = re.sub(r"(?i)\[(?:result|score|rating)\]\s*:?", "verdict: ", text)  # [RESULT] 85
    return re.sub(r"<(\w+)>", r"\1: ", text)  # <score>85</score>


def _without_reasoning(reply: str) -> str:
    text = _END_OF_THINKING.split(reply)[-1].strip()
    if not _OPEN_THINKING.search(text):
        return text
    # The reasoning does not end: only an object at the end of the reply counts.
    _, start, last = text.rstrip("`\n ").rpartition("{")
    return start + last if ":" in last and last.endswith("}") else ""


def _bare(text: str, form: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """The matches of the first and of the last line."""
    lines = [bare for line in text.splitlines() if (bare := line.strip(" \t\"'[](){}.!"))]
    return (found for line in {*lines[:1], *lines[-1:]} if (found := form.fullmatch(line)))


# --- scores --------------------------------------------------------------------------------------

_SCORE_LABELS = "score|rating|grade|overall|verdict"
_MARKS = r"[\s\"'‘’\\()\[\]{}]*"
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?(?!\w|[.,][0-9])"
_VALUE = (
    rf"(?P<number>{_NUMBER})(?:\s*(?:points?|marks?))?"
    rf"(?:{_MARKS}(?:/|out\s+of){_MARKS}(?P<scale>{_NUMBER})|\s*%)?"
)
_LABELLED_SCORE = re.compile(
    rf"(?i)(?:\b(?P<final>final|overall|total)[\s_]+|(?P<key>[\"'])|\b)(?P<label>{_SCORE_LABELS})\b"
    rf"(?:\s*\([^)]*\))?{_MARKS}(?:[:=|>]|\s-\s|\b(?:is|of|(?:would|should)\s+be)\b){_MARKS}"
    rf"(?:(?:about|around|approximately|roughly)\s+)?{_VALUE}"
    r"(?!\s*[0-9]|[ \t]*(?:[-,]|\b(?:to|or|and)\b)[ \t]*[0-9])"  # 80 to 90
)
_SCALED_SCORE = re.compile(rf"(?i)(?<![\w.,/-]){_VALUE}")
_BARE_SCORE = re.compile(rf"(?i){_VALUE}(?:\s*[-:(][^0-9]*)?")  # 85 (good)
_OWN_SCALE = re.compile(r"(?i)(?:\(|\bscale\s+(?:of|from)\s+)[01]\s*(?:-|to)\s*([0-9]{1,3})\b")


def _stated_scores(text: str) -> Iterator[Statement]:
    stated = list(_LABELLED_SCORE.finditer(text))
    if any(one["final"] for one in stated):  # the others are parts of it
        stated = [one for one in stated if one["final"] or one["key"]]
    stated += [one for one in _SCALED_SCORE.finditer(text) if one["scale"] == "100"]
    tops = [float(top) for top in _OWN_SCALE.findall(text) if top != "100"]
    for one in stated or _bare(text, _BARE_SCORE):
        number, label = float(one["number"]), one.groupdict().get("label") or "score"
        # The prompt asks for a score; another word may come with a scale of its own.
        own = max([*tops, 0 if label.lower() == "score" else 10])
        scale = float(one["scale"] or (own if 0 < number <= own else 100))
        # 8.5 is of a scale up to 10, and 0.85 of one up to 1.
        if 0 <= number <= scale and (scale != 100 or number > 10 or number.is_integer()):
            yield 100 * number / scale if scale else 0.0, scale == 100


# --- pairs ---------------------------------------------------------------------------------------

_BETTER_LABELS = "better|verdict|winner|preferred|preference|choice|best|result|decision|judge?ment"
_NOUN = r"(?:answer|response|assistant|option|candidate|model|reply)"
_WHICH = (
    r"(?:(?P<tie>0|(?:a\s+)?(?:tie|draw)|tied|equal(?:ly\s+good)?|both|neither|same|(?-i:C))"
    rf"|(?P<one>(?:the\s+)?first(?:\s+(?:{_NOUN}|one))?|{_NOUN}[\s:_(]*(?:1|A|one)\)?|1|(?-i:A))"
    rf"|(?P<two>(?:the\s+)?second(?:\s+(?:{_NOUN}|one))?|{_NOUN}[\s:_(]*(?:2|B|two)\)?|2|(?-i:B)))"
)
_VALUES = {"tie": 0.0, "one": 1.0, "two": 2.0}
_STATED = [
    re.compile("(?i)" + form.replace("WHICH", _WHICH))
    for form in (
        rf"\bWHICH(?:'s)?(?:\s+{_NOUN})?[\"']*\s+(?:is|was)\s+(?:(?:slightly|clearly|much|far"
        r"|significantly|marginally|somewhat|a\s+(?:bit|little)|the)\s+)?"
        r"(?:better|best|superior|preferable|preferred|stronger|winner)\b",
        r"\bWHICH[\"']*\s+wins\b",
        r"\b(?:prefer|choose|pick|select|favou?r|go\s+with)\s+WHICH\b",
        rf"\bWHICH\s*>+\s*(?:{_NOUN}\s*)?[12AB]\b",
        r"\[\[\s*WHICH\s*(?:>+\s*\w\s*)?\]\]",
        rf"\b(?:{_BETTER_LABELS})(?:[\s_]+(?:answer|response|one))?{_MARKS}(?:[:=>]|\bis\b){_MARKS}"
        r"WHICH(?!\w|\.[1-9]|\s*(?:,|\b(?:or|and)\b)\s*[0-9])",
        r"(?P<tie>\[\[\s*A\s*=\s*B\s*\]\]|\bequally\s+(?:good|bad|correct|strong)\b"
        r"|\bof\s+equal\s+quality\b|\bit(?:'s|\s+is)\s+a\s+(?:tie|draw)\b"
        r"|\b(?:is|are)\s+(?:tied|equal|(?:about\s+)?the\s+same)\b"
        r"|\bno\s+(?:(?:real|clear|significant)\s+)?difference\b)",
    )
]
_BARE_BETTER = re.compile(rf"(?i){_WHICH}(?:\.0)?")
# Before a statement, in its sentence: it is denied, or only considered.
_DENIED = re.compile(r"(?i)(?:\b(?:not|nor|whether|if|unless|never)\b|n't\b)[^.\n]{0,40}$")


def _stated_better(text: str) -> Iterator[Statement]:
    stated = [
        found
        for form in _STATED
        for found in form.finditer(text)
        if not _DENIED.search(text[max(0, found.start() - 60) : found.start()])
    ]
    for found in stated or _bare(text, _BARE_BETTER):
        yield _VALUES[str(found.lastgroup)], True

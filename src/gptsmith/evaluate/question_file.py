"""Custom multiple-choice files: detect the columns of question, choices and answer.

Choices are a list, texts with labels, or one column each; the answer is a label, a letter, a text,
or a number from 0 or from 1. The form of the answers is decided for the whole file: the one in
which all of them are valid choices. Two forms that would give different answers are an error.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gptsmith.data.columns import quoted
from gptsmith.data.options import FileFormat
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row
from gptsmith.evaluate.task_data import question_rows, text

# Common names of columns, without case, spaces and underscores; the first one present is used.
QUESTION = (
    "question", "questionstem", "stem", "query", "prompt", "goal", "problem", "instruction",
    "input", "ctx", "sentence", "text", "q",
)  # fmt: skip
CONTEXT = ("context", "passage", "article", "story", "support", "premise", "background")
CHOICES = (
    "choices", "options", "endings", "answers", "candidates", "alternatives", "answerchoices",
)  # fmt: skip
ANSWER = (
    "answer", "answerkey", "label", "gold", "target", "correct", "correctanswer", "correctoption",
    "correctchoice", "answeridx", "answerindex", "answerletter", "ans", "cop", "key", "solution",
)  # fmt: skip
RIGHT = ("correctanswer", "correct", "rightanswer", "answer")  # beside wrong answers
WRONG = ("distractors", "incorrectanswers", "wronganswers")
ID = ("id", "qid", "questionid", "ind", "idx", "index")
# Before the letter or number of a column per choice: A, option_a, choice1, sol1, ending0.
PREFIXES = (
    "", "option", "opt", "op", "choice", "answer", "ans", "sol", "solution", "ending",
    "alternative", "candidate", "response", "mc",
)  # fmt: skip
WRONG_PREFIXES = ("distractor", "incorrectanswer", "wronganswer", "incorrect", "wrong")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBERED = (LETTERS.lower(), [str(n) for n in range(100)], [str(n) for n in range(1, 100)])
SEPARATORS = ("\n", "|", ";")  # of choices in one cell
_ARRAY = re.compile(r"\barray\((\[[^\]]*\])(?:,\s*dtype=[^)]*)?\)")  # as pandas writes numpy's
_QUOTED = re.compile(r"""(?s)(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?P<next>\s*(?=['"]))?""")
BRACKETS = 100  # in a cell that is read as a list: nested ones would take time


class QuestionRow(NamedTuple):
    """A row of a question file. labels: one per choice, "" if it has none."""

    place: str
    id: str
    question: str
    choices: list[str]
    labels: list[str]
    answer: Any


class Columns(NamedTuple):
    """Names of columns. choices: one that lists them, or one per choice. wrong: whether these are
    the wrong answers, to which the answer is added."""

    question: str
    context: str | None
    choices: list[str]
    listed: bool
    answer: str
    wrong: bool
    id: str | None


def read_questions(
    path: Path,
    report: ReadReport,
    form: FileFormat | None = None,
    first_choice: int | None = None,
) -> tuple[list[tuple[QuestionRow, int]], list[str]]:
    """The questions of a file, each with the index of its answer; and notes.

    form: encoding and delimiter, if they are not to be detected. first_choice: number of the first
    choice, if the answers are numbers. ValueError naming the place for columns that are not
    obvious, for a row that cannot be used unless `report` skips it, and if the form of the answers
    is ambiguous.
    """
    rows = [_flat(row) for row in question_rows(path, report, form)]
    if not rows:
        raise ValueError(f"{path}: no questions in it")
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    columns = _columns(names, rows[0].place)
    questions = []
    for row in rows:
        try:
            questions.append(_question(row, columns))
        except ValueError as error:
            report.reject("unusable row", row.place, str(error).removeprefix(f"{row.place}: "))
    answered = _answers(path, questions, report, first_choice)
    used = {columns.question, columns.context, *columns.choices, columns.answer, columns.id}
    unused = [name for name in names if name and name not in used]
    notes = [f"{path}: columns that are not used: {', '.join(unused)}"] if unused else []
    return answered, [*report.hints, *notes, *(f"{path}: {line}" for line in report.lines())]


# --- columns -------------------------------------------------------------------------------------


def _columns(names: Sequence[str], place: str) -> Columns:
    by_name = {_normalized(name): name for name in reversed(names)}

    def first(usual: Iterable[str], taken: Iterable[str | None] = ()) -> str | None:
        found = (by_name[name] for name in usual if name in by_name)
        return next((name for name in found if name not in taken), None)

    wrong, listed = False, first(CHOICES)
    choices = [listed] if listed else _numbered(names, PREFIXES, 2)
    if not choices:
        wrong, listed = True, first(WRONG)
        choices = [listed] if listed else _numbered(names, WRONG_PREFIXES, 1)
    context = first(CONTEXT, choices)
    question = first(QUESTION, choices)
    if question is None:
        question, context = context, None
    answer = first(RIGHT if wrong else ANSWER, [*choices, question, context])
    if question and choices and answer:
        return Columns(question, context, choices, bool(listed), answer, wrong, first(ID, choices))
    what, usual = "answer", "answer"
    if not question:
        what, usual = "question", "question"
    elif not choices:
        what, usual = "choices", "choices, with a list, or A, B, C, D"
    raise ValueError(f"{place}: no column for the {what}, only {quoted(names)}: call it {usual}")


def _normalized(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _numbered(names: Sequence[str], prefixes: Sequence[str], least: int) -> list[str]:
    """Columns of one choice each, such as A to D or option1 to option4, in order; [] if none."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*?)([a-z]|\d{1,2})", _normalized(name)):
            groups.setdefault(found[1], {}).setdefault(found[2], name)
    for group in (groups[prefix] for prefix in prefixes if prefix in groups):
        for suffixes in NUMBERED:
            run = [group[suffix] for suffix in takewhile(group.__contains__, suffixes)]
            if len(run) >= least:
                return run
    return []


# --- rows ----------------------------------------------------------------------------------------


def _flat(row: Row) -> Row:
    """The row with the fields of a `question` that is an object, as in AI2's files."""
    question = row.values.get("question")
    if not isinstance(question, dict):
        return row
    return row._replace(values={k: v for k, v in row.values.items() if k != "question"} | question)


def _question(row: Row, columns: Columns) -> QuestionRow:
    values = row.values
    # The prompt of ARC, without doubling what a file already wrote.
    asked = text(row, columns.question).strip()
    asked = asked.removeprefix("Question:").removesuffix("Answer:").strip()
    question = f"Question: {asked}\nAnswer:"
    if columns.context and values.get(columns.context) not in (None, ""):
        question = f"{text(row, columns.context)}\n{question}"
    given = [values.get(name) for name in columns.choices]
    choices, labels = _listed(given[0] if columns.listed else given)
    while choices and not choices[-1]:  # a row may have fewer choices
        choices, labels = choices[:-1], labels[:-1]
    if lettered := _lettered(choices):
        choices, labels = lettered, [*LETTERS[: len(lettered)]]
    answer: Any = values.get(columns.answer)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if columns.wrong:
        choices, labels = [*choices, _text(answer)], [*labels, ""]
        answer = LETTERS[len(choices) - 1]
    if len(choices) < 2 or not all(choices):
        problem = f"the choices are {choices!r:.60}, not two or more texts"
        if columns.listed and isinstance(given[0], str):
            problem = f"the choices {given[0]!r:.60} are one text: separate them by |"
        raise ValueError(f"{row.place}: {problem}")
    for choice in choices:
        text(row, "choice", {"choice": choice})  # checks that it is Unicode
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise ValueError(f"{row.place}: it has no answer in {columns.answer!r}")
    own_id = values.get(columns.id or "")
    name = Path(row.place).name if own_id is None else str(own_id)
    return QuestionRow(row.place, name, question, choices, labels, answer)


def _listed(value: Any) -> tuple[list[str], list[str]]:
    """Choices and their labels: a list of texts or of {label, text}, lists of both, a mapping from
    label to text, or one of these as the text of a cell."""
    if isinstance(value, str):
        value = _cell(value)
    labels = None
    if isinstance(value, Mapping):
        texts = _field(value, "text", "texts", "choices")
        labels = _field(value, "label", "labels", "key")
        if not isinstance(texts, list):
            kept = {str(key): inner for key, inner in value.items() if inner is not None}
            texts, labels = list(kept.values()), list(kept)
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        texts = [_field(one, "text", "content", "value", "choice", "option") for one in value]
        labels = [_field(one, "label", "key", "letter", "id") for one in value]
    else:
        texts = value if isinstance(value, list) else []
    if not isinstance(labels, list) or len(labels) != len(texts):
        labels = [""] * len(texts)
    return [*map(_text, texts)], [*map(_text, labels)]


def _field(value: Any, *names: str) -> Any:
    """The first of the fields that an object has."""
    fields = (
        {_normalized(str(k)): v for k, v in value.items()} if isinstance(value, Mapping) else {}
    )
    return next((fields[name] for name in names if name in fields), None)


def _lettered(choices: Sequence[str]) -> list[str]:
    """Choices without the letters that they begin with, as in `A) red`; [] if not all do."""
    found = [re.fullmatch(r"(?s)\(?([A-Z])[).:]\s*(.+)", choice) for choice in choices]
    texts = [one[2] for one, a in zip(found, LETTERS, strict=False) if one and one[1] == a]
    return texts if len(texts) == len(choices) else []


def _cell(value: str) -> Any:
    """A list or mapping that a CSV holds as text (JSON, or Python's form), or separated choices."""
    value = _ARRAY.sub(r"\1", value).strip()
    if value[:1] in ("[", "{"):
        if value.count("[") + value.count("{") > BRACKETS:
            return None
        with suppress(ValueError):
            return json.loads(value, parse_int=str, parse_float=str)
        with suppress(yaml.YAMLError):
            return yaml.load(_as_yaml(value), yaml.BaseLoader)
        return None
    separator = next((s for s in SEPARATORS if s in value), None)
    return separator and [part.strip() for part in value.split(separator) if part.strip()]


def _as_yaml(value: str) -> str:
    """A list of texts in Python's or numpy's form, with texts as JSON spells them and commas
    between them; any other value as it is."""

    def as_json(found: re.Match[str]) -> str:
        comma = "" if found["next"] is None else ", "
        return json.dumps(str(ast.literal_eval(found["text"])), ensure_ascii=False) + comma

    if re.search(r"[^\[\]{},:\s]", _QUOTED.sub("", value)):
        return value
    with suppress(SyntaxError, ValueError):
        return _QUOTED.sub(as_json, value)
    return value


def _text(value: Any) -> str:
    """A text, or a number or a boolean as text; "" for anything else."""
    if not isinstance(value, str | int | float):
        return ""
    return value.strip() if isinstance(value, str) else str(value)


# --- answers -------------------------------------------------------------------------------------


def _interpretations(question: QuestionRow) -> dict[str, int]:
    """The index of the answer under each form in which it is a valid choice."""
    n, answer = len(question.choices), question.answer
    if isinstance(answer, float) and answer.is_integer():  # pandas, where an answer was missing
        answer = int(answer)
    # `Option B` and `choice_2` are B and 2.
    named = r"(?i)^(?:option|choice|answer)[\s_:]*(?=(?:[a-z]|\d{1,2})$)"
    written = re.sub(named, "", _text(answer))
    lettered = re.match(r"\(?([A-Za-z0-9])[).:]\s", written)  # A) red
    short = lettered[1] if lettered else written.strip("().: ")
    found = {
        "labels": _index(question.labels, short),
        "letters": _index(LETTERS[:n], short),
        "texts": _index(question.choices, written),
    }
    if re.fullmatch(r"\d{1,3}(?:\.0)?", written):
        number = int(float(written))
        found |= {"numbers from 0": number, "numbers from 1": number - 1}
    return {form: i for form, i in found.items() if i is not None and 0 <= i < n}


def _index(choices: Iterable[str], wanted: str) -> int | None:
    """The index of the only choice that equals `wanted`, ignoring case if necessary."""
    for form in (str, str.casefold):
        found = [i for i, choice in enumerate(choices) if choice and form(choice) == form(wanted)]
        if len(found) == 1:
            return found[0]
    return None


def _answers(
    path: Path, questions: Sequence[QuestionRow], report: ReadReport, first_choice: int | None
) -> list[tuple[QuestionRow, int]]:
    interpretations = [_interpretations(question) for question in questions]
    forms = ["labels", "letters", "texts", "numbers from 0", "numbers from 1"]
    if first_choice is not None:
        forms = [f"numbers from {first_choice}"]
    counts = {form: sum(form in found for found in interpretations) for form in forms}
    most = max(counts.values(), default=0)
    best = [form for form in forms if counts[form] == most]
    if "labels" in best:  # explicit labels take precedence
        best = ["labels"]
    answered = []
    for question, found in zip(questions, interpretations, strict=True):
        indices = {form: found[form] for form in best if form in found}
        if len(set(indices.values())) > 1:
            base = all(form.startswith("numbers") for form in indices)
            remedy = "--first-choice 0 or 1" if base else "write the answers as letters"
            raise ValueError(
                f"{question.place}: the answer {question.answer!r} can be read as "
                f"{' or as '.join(indices)}, and no other row tells which: {remedy}"
            )
        if indices:
            answered.append((question, next(iter(indices.values()))))
        else:
            report.reject(
                "answer that is no choice",
                question.place,
                f"the answer {question.answer!r:.40} is none of the {len(question.choices)} choices"
                + (f"; other rows have {best[0]}" if most else ""),
            )
    if not answered:
        raise ValueError(f"{path}: no question with an answer")
    return answered

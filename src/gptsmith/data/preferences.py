"""Read preferences, pairs of a better and a worse answer to the same question, from data sets.

A pair is two conversations that are equal up to the answers. In a row of a data set the question is
a column of its own (a text, or messages), or the answers are whole conversations, of which the
common beginning is the question; these may be one text each, as in Anthropic's HH.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.chat_template.message import Message, is_empty
from gptsmith.data import columns as names
from gptsmith.data.cells import InvalidRowError, cell_text
from gptsmith.data.columns import quoted
from gptsmith.data.conversations import Conversation, conversation_of, question_turns
from gptsmith.data.messages import ReadMessage, cell_message, is_message, read_message, transcript
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.report import ReadReport, Tally
from gptsmith.data.row import Row
from gptsmith.data.rows import read_rows
from gptsmith.terminal import counted


class Pair(NamedTuple):
    """Two conversations, of which the first is preferred.

    shared: number of messages with which both begin; the assistant's later ones are compared.
    """

    chosen: Conversation
    rejected: Conversation
    shared: int

    @property
    def question(self) -> list[Message]:
        return self.chosen.messages[: self.shared]


@dataclass
class PairCounts:
    """How the pairs of a data set are used, in examples of at most T + 1 tokens.

    report    rows that are no pairs, and hints about files
    kept      pairs that are used
    left_out  pairs that are not, by reason
    remarks   pairs that are changed
    """

    T: int
    report: ReadReport = field(default_factory=ReadReport)
    kept: int = 0
    left_out: Tally = field(default_factory=Tally)
    remarks: Tally = field(default_factory=Tally)

    def __str__(self) -> str:
        """A summary: first what is left out, then what is trained on."""
        left_out, pairs = [], self.kept + self.left_out.total
        if left := self.left_out.total:
            lines = ", ".join(self.left_out.lines())
            left_out = [f"left out: {left:,} of {pairs:,} pairs ({left / pairs:.1%}), {lines}"]
        kept = counted(self.kept, "pair") if self.kept else ""
        return self.report.usage(pairs, left_out, kept, self.kept == 1, self.remarks)


def read_pairs(
    sources: Sequence[str | Path], files: PreferenceFiles, counts: PairCounts
) -> Iterator[Pair]:
    """The pairs of files, folders and patterns (data/rows.py), in order.

    ValueError naming the place of a row that is no pair (unless counts.report skips it), or the
    columns of a source in which no columns are obviously the answers.
    """
    configured = (files.prompt_column, files.chosen_column, files.rejected_column)
    for source in sources:
        for number, row in enumerate(read_rows(source, counts.report, file_format=files)):
            row = row._replace(values=names.with_known_names(row.values, _KNOWN, configured))
            try:
                columns = answer_columns(row.values, files)
                if columns is None and not number:
                    raise _unclear_columns(row)
                if columns is None:
                    raise InvalidRowError("row without answers", "no answers, unlike rows before")
                if files.scores:
                    columns = _by_score(row, columns, counts)
                if columns is not None:
                    yield from _pair(row, columns, files, counts)
            except InvalidRowError as error:
                counts.report.reject(error.kind, row.place, str(error))


_KNOWN = {
    *names.MESSAGES, *names.PROMPTS, *names.CONTEXT, *names.HISTORY, *names.SYSTEM, *names.TOOLS,
    *names.MEDIA, *(name for pair in names.CHOSEN_AND_REJECTED for name in pair),
    *(name for pair in names.SCORES for name in pair),
}  # fmt: skip


def answer_columns(columns: Iterable[str], files: PreferenceFiles) -> tuple[str, str] | None:
    """The columns of the better and of the worse answer; None if they are not obvious."""
    columns = list(columns)
    if files.chosen_column is not None and files.rejected_column is not None:
        pair = files.chosen_column, files.rejected_column
        return pair if {*pair} <= {*columns} else None
    return next((pair for pair in names.CHOSEN_AND_REJECTED if {*pair} <= {*columns}), None)


def holds_preferences(source: str | Path, files: PreferenceFiles) -> bool:
    """Whether the first row of a data set has two answers. Errors are left to its reader."""
    with suppress(ValueError, OSError):
        for row in read_rows(source, ReadReport("skip"), file_format=files):
            return answer_columns(row.values, files) is not None
    return False


def _unclear_columns(row: Row) -> ValueError:
    return ValueError(
        f"{row.place}: which columns hold the better and the worse answer? Choose from "
        f"{quoted(row.values)} with --chosen-column NAME and --rejected-column NAME"
    )


def _by_score(row: Row, columns: tuple[str, str], counts: PairCounts) -> tuple[str, str] | None:
    """The columns in the order of the row's scores; None if these are equal."""
    for pair in names.SCORES:
        values = [row.values.get(name) for name in pair]
        if any(map(is_empty, values)):
            continue
        try:
            chosen, rejected = map(float, values)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            problem = f"{quoted(pair)} hold {values}, not numbers (--no-scores ignores them)"
            raise InvalidRowError("unreadable score", problem) from None
        if chosen == rejected:
            counts.left_out.add("with equal scores", row.place)
            return None
        if chosen < rejected:
            counts.remarks.add("swapped, since the rejected answer has the better score", row.place)
            return columns[::-1]
        break
    return columns


def _pair(
    row: Row, columns: tuple[str, str], files: PreferenceFiles, counts: PairCounts
) -> Iterator[Pair]:
    """The pair of a row; nothing if its answers cannot be compared."""
    values = row.values
    answers = [_answer(values[name], name, files) for name in columns]
    whole = [read_message(turns[0], files).message["role"] != "assistant" for turns in answers]
    if len({*whole}) > 1:
        problem = f"of {quoted(columns)}, one begins with a question, the other with an answer"
        raise InvalidRowError("answers of two kinds", problem)
    before: list[Any] = []
    used = {*columns}
    if not whole[0]:
        before, used = _question(row, used, files)
        answers, before = _continued(answers, before)
    used |= {name for pair in names.SCORES for name in pair} | _repeated(values, columns)
    row = row._replace(values={**values, **_tools_of_question(values)})
    chosen, rejected = (
        conversation_of(row, [*before, *turns], used, files, counts.report) for turns in answers
    )
    a, b = chosen.messages, rejected.messages
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    reason = ""
    if shared is None:
        equal = len(a) == len(b)
        reason = "with equal answers" if equal else "with an answer that goes on after the other"
    elif {a[shared]["role"], b[shared]["role"]} != {"assistant"}:
        reason = "with different questions"
    elif all(message["role"] == "system" for message in a[:shared]):
        reason = "without a question"
    if reason:
        counts.left_out.add(reason, row.place)
    else:
        assert shared is not None
        yield Pair(chosen, rejected, shared)


def _answer(value: Any, name: str, files: PreferenceFiles) -> list[Any]:
    """The messages of an answer, which may begin with those of its question."""
    text = f"the column {name!r}"
    return _messages(value, files) or [cell_message("assistant", cell_text(value, text))]


def _messages(value: Any, files: PreferenceFiles) -> list[Any]:
    """The messages that a cell holds: a list, one of them, either as JSON, or a conversation in one
    text; empty for any other text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # in a table of text
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            value = found if _are_messages(found, files) else value
    if _are_messages(value, files):
        return [value] if isinstance(value, Mapping) else value
    return transcript(value)


def _are_messages(value: Any, files: PreferenceFiles) -> bool:
    turns = [value] if isinstance(value, Mapping) else value
    return isinstance(turns, list) and any(is_message(turn, files) for turn in turns)


def _question(row: Row, used: set[str], files: PreferenceFiles) -> tuple[list[Any], set[str]]:
    """The messages before the answers, and all columns that are used."""
    values = row.values
    usual = (files.prompt_column,) if files.prompt_column else (*names.PROMPTS, *names.MESSAGES)
    name = next((n for n in usual if n not in used and not is_empty(values.get(n))), None)
    if name is None:
        problem = f"no question in {quoted(values)}: --prompt-column NAME names its column"
        raise InvalidRowError("no question", problem)
    value = values[name]
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI
        value = value["messages"]
    turns = _messages(value, files)
    if not turns:
        return question_turns(values, name, used)
    return turns, used | {name}


def _continued(answers: list[list[Any]], before: list[Any]) -> tuple[list[list[Any]], list[Any]]:
    """Answers to a question whose text ends with "\n\nAssistant:", and the question without it."""
    last = before[-1]
    if not isinstance(last, ReadMessage) or last.message != {"role": "assistant", "content": ""}:
        return answers, before
    stripped = [
        [cell_message("assistant", turns[0].message["content"].strip()), *turns[1:]]
        if isinstance(turns[0], ReadMessage)
        else turns
        for turns in answers
    ]
    return stripped, before[:-1]


def _repeated(values: Mapping[str, Any], columns: tuple[str, str]) -> set[str]:
    """The columns that repeat an answer or, where it is a whole conversation, one of its texts:
    they are not reported as unused."""
    known: list[Any] = [values[name] for name in columns]
    for value in known[:2]:
        turns = value if isinstance(value, list) else []
        known += [turn.get(n) for turn in turns if isinstance(turn, Mapping) for n in names.CONTENT]
    found = {name for name, value in values.items() if not is_empty(value) and value in known}
    return found.difference(names.SYSTEM, names.TARGET_FLAGS)


def _tools_of_question(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tools beside the messages of OpenAI's `input`."""
    given = values.get("input")
    return {n: given[n] for n in names.TOOLS if n in given} if isinstance(given, Mapping) else {}

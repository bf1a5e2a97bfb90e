"""Conversations from the forms in which the field keeps them, and their examples for training.

A conversation is an optional system message, then user and assistant in turns. What is none is an
error that names its place, or is left out and counted: the user chooses (report.ReadReport).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template import ChatTemplate, Message
from gptsmith.data.columns import listed
from gptsmith.data.examples import Example
from gptsmith.data.options import ChatColumns
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import Row, read_rows

# Where data sets keep the messages of a row (OpenAI, ShareGPT, Taskmaster), and in each message
# who speaks and what.
_MESSAGES = ("messages", "conversations", "conversation", "utterances")
_ROLE, _CONTENT = ("role", "from", "speaker"), ("content", "value", "text")
# ChatColumns that are one question and one answer; a system message may stand beside either form.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_PLACES = 3  # that a report names


class Conversation(NamedTuple):
    messages: list[Message]
    place: str


# --- reading -------------------------------------------------------------------------------------


def read_conversations(
    sources: Sequence[str | Path], report: ReadReport, columns: ChatColumns | None = None
) -> Iterator[Conversation]:
    """The conversations of files, folders and patterns, in order; rows.py says of which kinds.

    ValueError naming the place of what is no conversation (or it is counted), and the columns if
    none of them can be the messages.
    """
    for source in sources:
        found = False
        for row in read_rows(source, report):
            turns = _turns(row, columns or ChatColumns())
            if turns is None and not found:
                raise ValueError(
                    f"{row.place}: where are the messages? There are {listed(row.values)}; say "
                    "--messages-column NAME, or --prompt-column NAME and --response-column NAME"
                )
            if turns is None:
                report.reject("row without messages", row.place, "no messages like those before")
                continue
            found = True
            messages = _messages(turns, row.place, report)
            if messages is not None:
                yield Conversation(messages, row.place)


def _turns(row: Row, columns: ChatColumns) -> list[Any] | None:
    """The messages of a row as they are written there, the system message first."""
    values = row.values
    turns = None
    names = _MESSAGES if columns == ChatColumns() else (columns.messages,)
    if name := next((name for name in names if name is not None and name in values), None):
        turns = values[name]
        turns = list(turns) if isinstance(turns, list) else [turns]
    elif columns.messages is None:
        turns = _question_and_answer(row, columns)
    if turns is None:
        return None
    system = next((text for name in _SYSTEM if (text := values.get(name))), None)
    if isinstance(system, str) and not (turns and _said(turns[0])[0] == "system"):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _question_and_answer(row: Row, columns: ChatColumns) -> list[Any] | None:
    values = row.values
    if columns.prompt is not None and columns.response is not None:
        pairs = [(columns.prompt, columns.response)]
    else:
        pairs = list(_PAIRS)
    pairs = [pair for pair in pairs if pair[0] in values and pair[1] in values]
    if len(pairs) > 1:
        raise ValueError(
            f"{row.place}: which columns are question and answer? There are {listed(values)}; say "
            "--prompt-column NAME and --response-column NAME"
        )
    if not pairs:
        return None
    prompt, response = (values[name] for name in pairs[0])
    if isinstance(prompt, list) and isinstance(response, list):  # messages on both sides
        return [*prompt, *response]
    if pairs[0][0] == "instruction" and values.get("input"):  # Alpaca: what to apply it to
        prompt = f"{prompt}\n\n{values['input']}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _said(turn: Any) -> tuple[str | None, Any]:
    """Role, in our words, and content of a message; no role if it has none or an unknown one."""
    if not isinstance(turn, dict):
        return None, None
    role = next((turn[key] for key in _ROLE if key in turn), None)
    content = next((turn[key] for key in _CONTENT if key in turn), None)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]  # OpenAI's content in parts
        if all(isinstance(text, str) for text in texts):
            content = "".join(texts)
    return _ROLES.get(role.lower()) if isinstance(role, str) else None, content


def _messages(turns: list[Any], place: str, report: ReadReport) -> list[Message] | None:
    """The messages of a conversation, None if it is none and was counted as such."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role, content = _said(turn)
        here = f"message {number} of {len(turns)}"
        before = messages[-1]["role"] if messages else None
        problem = None
        if role is None:
            problem = "unknown role", f"{here}: no role of {listed(_ROLES)} in {str(turn)[:60]}"
        elif not isinstance(content, str):
            problem = "message without text", f"{here}: no text in {str(turn)[:60]}"
        elif role == "system" and before is not None:
            problem = "system message not at the beginning", f"{here}: a system message"
        elif role == before:
            problem = "same role twice in a row", f"{here}: {role} again"
        elif role == "assistant" and before in (None, "system"):
            problem = "answer without a question", f"{here}: an assistant message comes first"
        elif role == "assistant" and not content.strip():
            problem = "empty answer", f"{here}: an empty answer"
        if problem is not None:
            report.reject(problem[0], place, problem[1])
            return None
        assert role is not None
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        report.reject("conversation without an answer", place, "no assistant message")
        return None
    return messages


# --- encoding ------------------------------------------------------------------------------------


@dataclass
class Places:
    """How often something happened, and where it did first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < _PLACES:
            self.first.append(place)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count:,} ({', '.join(self.first)}{more})"


@dataclass
class Counts:
    """What became of the conversations of a set, in examples of at most T + 1 tokens.

    cut          lost their last exchanges, at a turn boundary
    too_long     were left out, because their first exchange alone is longer
    unscored     were left out, because nothing in them is learned
    unanswered   end with a question, which teaches nothing and was taken off
    left_out     rows that are no conversations, by kind (not among `read`)
    """

    T: int
    read: int = 0
    kept: int = 0
    cut: Places = field(default_factory=Places)
    too_long: Places = field(default_factory=Places)
    unscored: Places = field(default_factory=Places)
    unanswered: Places = field(default_factory=Places)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return self.too_long.count + self.unscored.count

    def __str__(self) -> str:
        words = {
            f"cut to {self.T + 1:,} tokens": self.cut,
            f"dropped, as one exchange is longer than {self.T + 1:,} tokens": self.too_long,
            "dropped, as nothing in them is learned": self.unscored,
            "ending with a question, taken off": self.unanswered,
        }
        parts = [f"{self.kept:,} of {self.read:,} conversations are used"]
        parts += [f"{what}: {places}" for what, places in words.items() if places.count]
        parts += [f"left out, {kind}: {count:,}" for kind, count in self.left_out.items()]
        return "; ".join(parts)


def encode_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    report: ReadReport,
    counts: Counts,
) -> Iterator[Example]:
    """Their examples, of at most counts.T + 1 tokens; what is cut or dropped is counted."""
    for messages, place in conversations:
        try:
            encoded = template.encode(messages)
        except ValueError as error:
            report.reject("conversation that the template refuses", place, str(error))
            continue
        ids = np.array(encoded.ids, np.int32)
        labels = np.where(encoded.scored, ids, np.int32(IGNORE_INDEX))
        if messages[-1]["role"] == "user":
            counts.unanswered.add(place)
        example = fit(Example(ids, labels, place), counts)
        if example is not None:
            yield example


def fit(example: Example, counts: Counts) -> Example | None:
    """The example up to the end of its last answer within counts.T + 1 tokens.

    An answer is never cut: None if the first is not within. What follows the last answer is taken
    off, as nothing in it is learned.
    """
    ids, labels, place = example
    counts.read += 1
    ends = answer_ends(labels)
    within = ends[ends <= counts.T + 1]
    if not len(ends):
        counts.unscored.add(place)
        return None
    if not len(within):
        counts.too_long.add(place)
        return None
    if len(within) < len(ends):
        counts.cut.add(place)
    counts.kept += 1
    return Example(ids[: within[-1]], labels[: within[-1]], place)


def answer_ends(labels: np.ndarray) -> np.ndarray:
    """Where runs of scored tokens end, as the number of tokens up to there."""
    scored = np.append(labels != IGNORE_INDEX, False)
    return np.flatnonzero(scored[:-1] & ~scored[1:]) + 1

"""Read conversations from the formats in which data sets store them.

A conversation is an optional system message followed by messages of the user and the assistant;
results of tools may follow the assistant's. Usually the user begins and the two alternate, but a
greeting before the first question and several messages of one speaker in a row are accepted too:
the template rejects what it cannot write. Any other row is an error that names its place, or is
skipped and counted, as configured. Every column of a row is used, known to be irrelevant, or
reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.chat_template.message import CALLS, Message, is_empty
from gptsmith.data import columns as names
from gptsmith.data import row_fields
from gptsmith.data.cells import InvalidRowError, parse_json
from gptsmith.data.columns import quoted
from gptsmith.data.messages import cell_message, is_message, read_message, transcript
from gptsmith.data.options import ChatFiles, MessageFormat
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row
from gptsmith.data.rows import read_rows


class Conversation(NamedTuple):
    """A conversation of validated messages.

    place    where it comes from, for errors
    targets  indices of the answers that are targets; None: all
    tools    what the assistant may call
    """

    messages: list[Message]
    place: str
    targets: frozenset[int] | None = None
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversations(
    sources: Sequence[str | Path], files: ChatFiles, report: ReadReport
) -> Iterator[Conversation]:
    """The conversations of files, folders and patterns (data/rows.py), in order.

    ValueError naming the place of a row that is not a conversation (unless `report` skips it), or
    the columns of a source in which no column can be the messages.
    """
    configured = (files.messages_column, files.prompt_column, files.response_column)
    for source in sources:
        for number, row in enumerate(read_rows(source, report, file_format=files)):
            row = row._replace(values=names.with_known_names(row.values, _KNOWN, configured))
            try:
                found = _messages_of(row, files)
                if found is None and not number:
                    raise _unclear_columns(row)
                if found is None:
                    problem = "no messages, unlike rows before"
                    raise InvalidRowError("row without messages", problem)
                yield conversation_of(row, *found, files, report)
            except InvalidRowError as error:
                report.reject(error.kind, row.place, str(error))


def conversation_of(
    row: Row, turns: list[Any], used: set[str], files: MessageFormat, report: ReadReport
) -> Conversation:
    """The conversation of a row. used: the columns from which `turns` were taken. InvalidRowError
    for a row that has none."""
    values = {name: value for name, value in row.values.items() if name not in used}
    row_fields.check_no_media(values)
    if system := row_fields.system_text(values):
        turns = with_system(turns, system, files)
    messages: list[Message] = []
    flags: list[bool | None] = []
    for number, turn in enumerate(turns, 1):
        try:
            message, flag = read_message(turn, files)
            _check_order(messages, message, flag)
        except InvalidRowError as error:
            here = f"message {number} of {len(turns)}"
            raise InvalidRowError(error.kind, f"{here}: {error}") from None
        messages.append(message)
        flags.append(flag)
        if flag and message["role"] != "assistant":
            report.hint("only answers are trained on, whatever the weights of other messages")
    conversation = Conversation(messages, row.place, tools=row_fields.tools_of(values))
    answers = conversation.answers
    if not answers:
        problem = "no assistant message"
        if "chosen" in values:
            problem += ": --prompt-column and --response-column name the columns of the question "
            problem += "and of the better answer"
        raise InvalidRowError("conversation without an answer", problem)
    targets = row_fields.target_answers(values, flags, answers)
    row_fields.report_unused_columns(values, set(), report)
    return conversation._replace(targets=None if len(targets) == len(answers) else targets)


_LIST = re.compile(r"\s*\[\s*[{\]]")  # not any text in brackets
_KNOWN = {
    *names.MESSAGES, *(name for pair in names.PROMPT_AND_RESPONSE for name in pair), *names.CONTEXT,
    *names.HISTORY, *names.SYSTEM, *names.TOOLS, *names.TARGET_FLAGS, *names.MEDIA,
}  # fmt: skip


# --- the messages of a row -----------------------------------------------------------------------


def _messages_of(row: Row, files: ChatFiles) -> tuple[list[Any], set[str]] | None:
    """The messages of a row, unchecked, and the columns they are from; None if it has none."""
    values = row.values
    usual = (files.messages_column,) if files.messages_column else names.MESSAGES
    named = [name for name in usual if name in values and files.prompt_column is None]
    name = min(named, key=lambda name: is_empty(values[name]), default=None)
    turns = values[name] if name else None
    turns = messages_in_text(turns, name) if name else turns
    turns = transcript(turns) or turns
    if files.messages_column is None and (is_empty(turns) or not isinstance(turns, list)):
        found = _question_and_answer(row, files)
        if found is not None or files.prompt_column is not None:
            return found
        name = name or _column_of_messages(values, files)
        turns = turns or (values[name] if name else None)
    if name is None:
        return None
    if is_empty(turns):
        raise InvalidRowError("conversation without an answer", f"no messages in {name!r}")
    return turns if isinstance(turns, list) else [turns], {name}


def messages_in_text(value: Any, name: str) -> Any:
    """The messages in the column `name`, which are JSON in a table of text."""
    return parse_json(value, name) if isinstance(value, str) and _LIST.match(value) else value


def _column_of_messages(values: Mapping[str, Any], files: ChatFiles) -> str | None:
    """The only column that holds messages, under an unknown name, if there is exactly one. None for
    a row that is itself a message: in a tree of messages, the list holds its replies."""
    if is_message(values, files):
        return None
    found = [
        name
        for name, value in values.items()
        if isinstance(value, list) and value and all(is_message(turn, files) for turn in value)
    ]
    return found[0] if len(found) == 1 else None


def _question_and_answer(row: Row, files: ChatFiles) -> tuple[list[Any], set[str]] | None:
    """The messages of a row with a question and an answer, and the columns they are from."""
    values = row.values
    usual: Sequence[tuple[str, str]] = names.PROMPT_AND_RESPONSE
    if files.prompt_column is not None and files.response_column is not None:
        usual = ((files.prompt_column, files.response_column),)
    pairs = [pair for pair in usual if pair[0] in values and pair[1] in values]
    if len(pairs) > 1:
        raise ValueError(
            f"{row.place}: which columns are question and answer? Choose from {quoted(values)} "
            "with --prompt-column NAME and --response-column NAME"
        )
    if not pairs:
        return None
    prompt, response = pairs[0]
    turns, used = question_turns(values, prompt, {prompt, response})
    if _holds_messages(values[response]):
        turns += values[response]
    elif is_message(values[response], files):
        turns.append(values[response])
    else:
        turns.append(cell_message("assistant", row_fields.cell(values, response)))
    return turns, used


def question_turns(
    values: Mapping[str, Any], prompt: str, used: set[str]
) -> tuple[list[Any], set[str]]:
    """The messages up to the question in the column `prompt`, and all columns that are used."""
    turns, used = row_fields.history(values), {*used, prompt, *names.HISTORY}
    if _holds_messages(values[prompt]):
        return turns + values[prompt], used
    text = row_fields.cell(values, prompt)
    if not text.strip():
        raise InvalidRowError("no question", f"no text in {prompt!r}")
    beside = row_fields.context(values, used)
    turns.append(cell_message("user", "\n\n".join([text, *beside.values()])))
    return turns, used | beside.keys()


def _unclear_columns(row: Row) -> ValueError:
    """The error for a table in which no column is obviously the messages."""
    values = row.values
    problem = f"{row.place}: which columns hold the messages? Choose from {quoted(values)} with "
    if not {"chosen", "rejected"} <= values.keys():
        return ValueError(
            f"{problem}--messages-column NAME, or with --prompt-column NAME and --response-column "
            "NAME"
        )
    prompts = [pair[0] for pair in names.PROMPT_AND_RESPONSE if pair[0] in values]
    options = f"--prompt-column {prompts[0] if prompts else 'NAME'} --response-column chosen"
    if not prompts and (isinstance(values["chosen"], list) or transcript(values["chosen"])):
        options = "--messages-column chosen"
    return ValueError(
        f"{problem}{options}, to train on the better answer of each pair; gptsmith finetune "
        "preference compares both"
    )


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value)


def with_system(turns: list[Any], text: str, files: MessageFormat) -> list[Any]:
    """Put the row's system message before the messages, unless they begin with the same one."""
    try:
        first = read_message(turns[0], files).message if turns else None
    except InvalidRowError:  # reported with its number later
        first = None
    if first is None or first["role"] != "system":
        return [cell_message("system", text), *turns]
    if first["content"].strip() != text.strip():
        problem = "the row's system message and that of its messages differ: keep one"
        raise InvalidRowError("two system messages", problem)
    return turns


def _check_order(before: Sequence[Message], message: Message, flag: bool | None) -> None:
    """InvalidRowError for a message that cannot follow those before it, or is empty."""
    role, last = message["role"], before[-1]["role"] if before else "system"
    if role == "system" and last != "system":
        raise InvalidRowError("system message not at the beginning", "a system message")
    if role == "tool" and last not in ("assistant", "tool"):
        raise InvalidRowError("tool without a call", "the result of a tool that was not called")
    is_blank = not message["content"].strip() and not any(name in message for name in CALLS)
    if role == "assistant" and is_blank and flag is not False:
        raise InvalidRowError("empty answer", "an empty answer")

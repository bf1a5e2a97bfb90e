"""Conversations from the formats in which data sets store them.

A conversation is an optional system message, then user and assistant in turns. Any other row is an
error that names its place, or is skipped and counted, as configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.chat_template import Message
from gptsmith.data import columns as names
from gptsmith.data.columns import quoted
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import Row, read_rows


class Conversation(NamedTuple):
    """Checked messages. place: where they are, for errors."""

    messages: list[Message]
    place: str


def read_conversations(
    sources: Sequence[str | Path], files: ChatFiles, report: ReadReport
) -> Iterator[Conversation]:
    """The conversations of files, folders and patterns (data/rows.py), in order.

    ValueError naming the place of a row that is not a conversation (unless `report` skips those),
    or the columns if no column of a source can be the messages.
    """
    for source in sources:
        is_first = True
        for row in read_rows(source, report, form=files):
            turns = _turns(row, files)
            if turns is None and is_first:
                raise ValueError(
                    f"{row.place}: which columns hold the messages? Choose from "
                    f"{quoted(row.values)} with --messages-column NAME, or with "
                    "--prompt-column NAME and --response-column NAME"
                )
            if turns is None:
                report.reject("row without messages", row.place, "no messages, unlike rows before")
                continue
            is_first = False
            messages = _messages(turns, row.place, report)
            if messages is not None:
                yield Conversation(messages, row.place)


def _turns(row: Row, files: ChatFiles) -> list[Any] | None:
    """The messages of a row, unchecked, the system message first; None if it has none."""
    values = row.values
    turns = None
    usual = (files.messages_column,) if files.messages_column else names.MESSAGES
    if files.prompt_column is None and (name := next((n for n in usual if n in values), None)):
        turns = values[name]
        turns = list(turns) if isinstance(turns, list) else [turns]
    elif files.messages_column is None:
        turns = _question_and_answer(row, files)
    if turns is None:
        return None
    system = next((text for name in names.SYSTEM if (text := values.get(name))), None)
    if isinstance(system, str) and not (turns and _role_and_content(turns[0])[0] == "system"):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _question_and_answer(row: Row, files: ChatFiles) -> list[Any] | None:
    values = row.values
    if files.prompt_column is not None and files.response_column is not None:
        usual = [(files.prompt_column, files.response_column)]
    else:
        usual = list(names.PROMPT_AND_RESPONSE)
    pairs = [pair for pair in usual if pair[0] in values and pair[1] in values]
    if len(pairs) > 1:
        raise ValueError(
            f"{row.place}: which columns are question and answer? Choose from {quoted(values)} "
            "with --prompt-column NAME and --response-column NAME"
        )
    if not pairs:
        return None
    prompt, response = (values[name] for name in pairs[0])
    if isinstance(prompt, list) and isinstance(response, list):  # messages on both sides
        return [*prompt, *response]
    if pairs[0][0] == "instruction" and values.get("input"):  # Alpaca: what it is about
        prompt = f"{prompt}\n\n{values['input']}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _role_and_content(turn: Any) -> tuple[str | None, Any]:
    """The role of a message (system, user, assistant; None for any other), and its content."""
    if not isinstance(turn, dict):
        return None, None
    role = next((turn[key] for key in names.ROLE if key in turn), None)
    content = next((turn[key] for key in names.CONTENT if key in turn), None)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]  # OpenAI's content in parts
        if all(isinstance(text, str) for text in texts):
            content = "".join(texts)
    return names.ROLES.get(role.lower()) if isinstance(role, str) else None, content


def _messages(turns: list[Any], place: str, report: ReadReport) -> list[Message] | None:
    """The messages of a conversation; None for an invalid one, which `report` counts."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role, content = _role_and_content(turn)
        here = f"message {number} of {len(turns)}"
        before = messages[-1]["role"] if messages else None
        problem = None
        if role is None:
            what = f"no role of {quoted(names.ROLES)} in {str(turn)[:60]}"
            problem = "unknown role", f"{here}: {what}"
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

"""Parse one message of a data set, in any of the common formats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from gptsmith.chat_template.message import CALLS, Message, is_empty, join_text_parts
from gptsmith.data import columns as names
from gptsmith.data.cells import InvalidRowError, cell_text, parse_json, target_flag
from gptsmith.data.columns import is_irrelevant, quoted
from gptsmith.data.options import MessageFormat


class ReadMessage(NamedTuple):
    """A message. is_target: as its flags say; None if it has none."""

    message: Message
    is_target: bool | None = None


def cell_message(role: str, text: str) -> ReadMessage:
    """A message from a cell of a table."""
    return ReadMessage({"role": role, "content": text})


def read_message(turn: Any, files: MessageFormat) -> ReadMessage:
    """The message with its role, its content and all other relevant non-empty fields.

    InvalidRowError for a message that cannot be interpreted.
    """
    if isinstance(turn, ReadMessage):
        return turn
    if not isinstance(turn, Mapping):
        raise InvalidRowError("unknown role", f"not a message: {str(turn)[:60]}")
    fields = {str(name): value for name, value in turn.items() if not is_empty(value)}
    shown = quoted(str(name)[:40] for name in list(turn)[:6])
    role = _role(fields.pop(_role_key(fields, files), None), shown, files)
    text_keys = _text_keys(files)
    candidates = [k for k in text_keys if k in fields] or [k for k in text_keys if k in turn]
    text_key = candidates[0] if candidates else text_keys[0]
    fields.pop(text_key, None)
    content = join_text_parts(turn.get(text_key))
    flags = _flags(fields, turn.get(text_key))
    more = {
        name: value
        for name, value in fields.items()
        if not is_irrelevant(name) or (name == "tool_call_id" and role == "tool")
    }
    for name in more.keys() & {*CALLS}:
        if (given := parse_json(more.pop(name), name)) is not None:  # in a table, JSON
            more[name] = given
            if name == "tool_calls":
                calls = given if isinstance(given, list) else [given]
                more[name] = [parse_json(call, name) for call in calls]
    if role == "call":
        role, content, more["tool_calls"] = "assistant", "", _calls(content)
    kind = "message without text"
    text = cell_text(content, "its text", kind)
    if is_empty(content) and content != "" and more.keys().isdisjoint(CALLS):
        raise InvalidRowError(
            kind,
            f"no text in {quoted(text_keys)}, of the fields {shown} (--text-key NAME chooses "
            "another)",
        )
    message = {**more, "role": role, "content": text}
    return ReadMessage(message, all(flags) if flags else None)  # type: ignore[arg-type]


def _flags(fields: dict[str, Any], content: Any) -> list[bool]:
    """Whether a message is a target, by its fields, which are removed, and by its parts."""
    flags = [target_flag(k, fields.pop(k)) for k in names.MESSAGE_TARGET_FLAGS if k in fields]
    flags += [not target_flag(k, fields.pop(k)) for k in names.MESSAGE_MASK_FLAGS if k in fields]
    if unclear := next(
        (k for k in names.MESSAGE_UNCLEAR_FLAGS if not is_empty(fields.get(k))), None
    ):
        raise InvalidRowError(
            "unknown weight",
            f"{unclear} does not say whether the message is a target: mark it with weight, 0 or 1, "
            f"and remove {unclear}",
        )
    parts = content if isinstance(content, list) else []
    of_parts = [_flags(dict(part), None) for part in parts if isinstance(part, Mapping)]
    if len({all(found) for found in of_parts}) > 1:
        raise InvalidRowError("unknown weight", "some parts of its content are targets, others not")
    return flags + [flag for found in of_parts for flag in found]


# Anthropic's HH ("\n\nHuman: "), and OpenAssistant Guanaco ("### Human: ").
_SPEAKER = re.compile(r"(?:^|\n\n|### ?)(Human|Assistant):[ \n]?")


def transcript(text: Any) -> list[ReadMessage]:
    """The messages of a conversation that is one text, each after `Human:` or `Assistant:`; empty
    for anything else."""
    first = _SPEAKER.search(text) if isinstance(text, str) else None
    if first is None or text[: first.start()].strip():
        return []
    parts = _SPEAKER.split(text)[1:]
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [cell_message(names.ROLES[who.lower()], said.strip()) for who, said in spoken]


def is_message(turn: Any, files: MessageFormat) -> bool:
    """Whether it looks like a message: it has a speaker and a text."""
    return (
        isinstance(turn, Mapping)
        and _role_key(turn, files) in turn
        and any(name in turn for name in _text_keys(files))
    )


def _text_keys(files: MessageFormat) -> tuple[str, ...]:
    return (files.text_key,) if files.text_key else names.CONTENT


def _role_key(fields: Mapping[str, Any], files: MessageFormat) -> str:
    """The field of the role: as configured, a common name, or the one with a configured role."""
    if files.role_key is not None:
        return files.role_key
    own = {role.lower() for role in (files.user_role, files.assistant_role) if role is not None}
    named = [k for k, v in fields.items() if isinstance(v, str) and v.strip().lower() in own]
    usual = next((name for name in names.ROLE if name in fields), names.ROLE[0])
    return usual if usual in named or not named else named[0]


def _role(value: Any, shown: str, files: MessageFormat) -> str:
    own = {files.user_role: "user", files.assistant_role: "assistant"}
    roles = names.ROLES | {name.lower(): role for name, role in own.items() if name is not None}
    role = roles.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        what = f"unknown role {str(value)[:40]!r}"
        if value is None:
            what = f"no role in the fields {shown}"
        raise InvalidRowError(
            "unknown role",
            f"{what} (--user-role NAME and --assistant-role NAME name others, --role-key NAME the "
            "field)",
        )
    return role


def _calls(content: Any) -> list[Any]:
    """Tool calls that are given as JSON text (LLaMA-Factory): one object, or a list of them."""
    if isinstance(content, str):
        with suppress(ValueError, RecursionError):
            content = json.loads(content)
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise InvalidRowError("unreadable call", f"not a call in JSON: {str(content)[:60]}")
    return [{"type": "function", "function": dict(call)} for call in calls]

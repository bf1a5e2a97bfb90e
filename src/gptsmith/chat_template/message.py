"""Messages of a conversation: a role, a text, and further fields that some templates write."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NotRequired, TypedDict

ROLES = ("system", "user", "assistant", "tool")

# Fields that are part of the conversation's content: a template that omits them would show the
# model another conversation. The names in CALLS, and those in REASONING, are synonyms.
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
CONTENT_FIELDS = (
    *CALLS, *REASONING, "tool_call", "tool_use", "tool_plan", "reasoning_details", "refusal",
    "audio", "image", "images", "video", "videos",
)  # fmt: skip


class Message(TypedDict):
    role: str
    """system, user, assistant or tool"""
    content: str
    """Text; lists of `{"type": "text", "text": ...}`, as some data sets have, are joined."""
    tool_calls: NotRequired[list[Any]]
    """Tool calls of the assistant, in the format that the template reads (mostly OpenAI's)."""
    reasoning_content: NotRequired[str]
    """The assistant's reasoning before its answer. Other fields may be present too: the template
    gets those that it reads."""


def is_empty(value: Any) -> bool:
    """Whether a field is empty: null, NaN, an empty text or an empty container."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def without_nulls(value: Any) -> Any:
    """A copy without null fields at any depth, which Arrow tables add to structs."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return list(map(without_nulls, value)) if isinstance(value, list | tuple) else value


def join_text_parts(content: Any) -> Any:
    """Join a content that is a list of text parts; any other content is returned unchanged."""
    if isinstance(content, list | tuple) and content and all(map(_is_text, content)):
        return "".join(part["text"] for part in content)
    return content


def _is_text(part: Any) -> bool:
    kinds = (None, "text", "input_text", "output_text")
    return isinstance(part, Mapping) and isinstance(part.get("text"), str) and (
        part.get("type") in kinds and not part.get("thought")  # Gemini's
    )  # fmt: skip


def validated(messages: Sequence[Message]) -> list[Message]:
    """The messages with contents as plain strings and without empty fields.

    ValueError naming the first message that is invalid.
    """
    if not messages:
        raise ValueError("the conversation has no messages")
    plain = []
    for i, message in enumerate(messages):
        place = f"message {i + 1} of {len(messages)}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'{place}: expected {{"role": ..., "content": ...}}')
        role, content = message["role"], join_text_parts(message["content"])
        more = {k: without_nulls(v) for k, v in message.items() if not is_empty(v)}
        if role not in ROLES:
            raise ValueError(f"{place}: unknown role {str(role)[:40]!r}; use {', '.join(ROLES)}")
        if content is None and not more.keys().isdisjoint(CALLS):
            content = ""
        if isinstance(content, list):
            raise ValueError(f"{place}: its content has parts that are not text")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise ValueError(f"{place}: its content is not text but {kind} {str(content)[:40]}")
        plain.append(more | {"role": role, "content": content})
    return plain  # type: ignore[return-value]


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Indices of the messages that begin a turn: the first one that is not the system's, and each
    user message that follows another role's."""
    roles = ["system", *(message["role"] for message in messages)]
    return [
        i
        for i, (last, role) in enumerate(pairwise(roles))
        if role != last and (role == "user" or last == "system")
    ]


def template_fields(message: Message, place: str, reads: Callable[[str], bool]) -> dict[str, Any]:
    """The fields of a validated message that a template reads, under the names that it reads.

    reads: whether the template reads a field of this name. ValueError, beginning with `place`, for
    a content field (see CONTENT_FIELDS) that the template does not read.
    """
    fields: dict[str, Any] = dict(message)
    if len(fields) == 2:
        return fields
    thoughts = [name for name in REASONING if name in fields]
    name = next(filter(reads, [*thoughts, *REASONING]), None)
    if thoughts and name is not None:
        value = fields[name if name in thoughts else thoughts[0]]
        fields = {k: v for k, v in fields.items() if k not in thoughts} | {name: value}
    if "function_call" in fields and reads("tool_calls") and not reads("function_call"):
        call = {"type": "function", "function": fields.pop("function_call")}
        fields.setdefault("tool_calls", [call])
    for name in CONTENT_FIELDS:
        if name in fields and not reads(name):
            raise ValueError(f"{place}: it has {name}, which the chat template does not write")
    return {k: v for k, v in fields.items() if k in ("role", "content") or reads(k)}


def split_reasoning(message: Message) -> Message:
    """Move reasoning in <think>...</think> at the start of an answer to `reasoning_content`, as
    templates that read that field do themselves (Qwen 3). Other messages are unchanged."""
    before, end, after = message["content"].partition("</think>")
    start, _, thoughts = before.rpartition("<think>")
    is_clear = end and not start.strip() and "</think>" not in after
    if message["role"] != "assistant" or not is_clear or any(map(message.__contains__, REASONING)):
        return message
    apart: Message = {**message, "content": after.lstrip("\n")}
    if thoughts := thoughts.strip("\n"):
        apart["reasoning_content"] = thoughts
    return apart


def text_forms(text: str, escaped: bool) -> Iterator[str]:
    """The forms in which a template may write a text: unchanged, trimmed, or `escaped` in JSON."""
    yield text
    yield from (text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"))
    if escaped:
        yield json.dumps(text, ensure_ascii=False)[1:-1]

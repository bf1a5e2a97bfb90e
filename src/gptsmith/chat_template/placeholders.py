"""Placeholders for the texts of messages, to tell the template's own text from theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptsmith.chat_template.message import CALLS, CONTENT_FIELDS

# A placeholder: the index of the message, and of the text if it is not the content, between Unicode
# noncharacters, which are reserved for internal use. BREAK is inserted into special tokens that are
# spelled out where no placeholder can stand.
PLACEHOLDER = re.compile("\ufdd0([\\d.]+)\ufdd1")
BREAK = "\ufdd2"
_RESERVED = re.compile("[\ufdd0-\ufdd2]")
_IDENTIFIERS = ("id", "type", "tool_call_id")  # templates may compare these without writing them

Escape = Callable[[str], str]


class MarkedMessage(NamedTuple):
    """A message with placeholders for its texts.

    fields   the fields without placeholders
    marked   the fields with a placeholder for each text
    texts    placeholder -> its text
    needed   placeholder -> its field, for the content fields, which the template must write
    shape    what the layout may depend on: everything except the texts
    """

    fields: dict[str, Any]
    marked: dict[str, Any]
    texts: dict[str, str]
    needed: dict[str, str]
    shape: str


class MarkedConversation(NamedTuple):
    """A conversation with placeholders. tools: what the assistant may call."""

    messages: Sequence[MarkedMessage]
    tools: list[Any] | None = None

    @property
    def shape(self) -> tuple[str, ...]:
        """What the layout may depend on: everything except the texts of the messages."""
        tools = json.dumps(self.tools, ensure_ascii=False) if self.tools else ""
        return tools, *(message.shape for message in self.messages)

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [i for i, one in enumerate(self.messages) if one.marked["role"] == "assistant"]

    def before(self, i: int) -> MarkedConversation:
        return self._replace(messages=self.messages[:i])


def marked_message(i: int, message: Mapping[str, Any], escape: Escape) -> MarkedMessage:
    """Message i with placeholders. escape: breaks special tokens in texts without a placeholder."""
    role, content = message["role"], message["content"]
    if len(message) == 2:
        marked = {"role": role, "content": placeholder_for(i)}
        return MarkedMessage(dict(message), marked, {str(i): content}, {str(i): "content"}, role)
    fields, marked, texts, needed = {"role": role}, {"role": role}, {}, {}
    if content or not any(name in message for name in CALLS):
        fields["content"], marked["content"] = content, placeholder_for(i)
        texts[str(i)], needed[str(i)] = content, "content"
    else:  # templates test whether there is a content beside a call
        fields["content"] = marked["content"] = ""
    for name, value in message.items():
        if name in ("role", "content"):
            continue

        def placeholder(text: str, name: str = name) -> str:
            key = f"{i}.{len(texts)}"
            texts[key] = text
            if name in CONTENT_FIELDS:
                needed[key] = name
            return placeholder_for(key)

        fields[name] = replace_texts(value, str, escape, name)
        marked[name] = replace_texts(value, placeholder, escape, name)
    shape = PLACEHOLDER.sub("\ufdd0\ufdd1", json.dumps(marked, ensure_ascii=False))
    return MarkedMessage(fields, marked, texts, needed, shape)


def placeholder_for(key: int | str) -> str:
    return f"\ufdd0{key}\ufdd1"


def message_index(found: re.Match[str]) -> int:
    """The index of the message that a placeholder belongs to."""
    return int(found[1].partition(".")[0])


def replace_texts(value: Any, text: Callable[[str], str], escape: Escape, name: str = "") -> Any:
    """A copy with `text(...)` of every text, and `escape(...)` of names and identifiers. Dates and
    whatever else a table holds that JSON does not become texts."""
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {escape(str(k)): replace_texts(v, text, escape, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_texts(v, text, escape) for v in value]
    return escape(str(value)) if name in _IDENTIFIERS else text(str(value))


def break_special_tokens(text: str, special: re.Pattern[str]) -> str:
    """The text without placeholder characters, and with BREAK inside every special token.

    ValueError for a special token of one character, which cannot be broken up.
    """
    text = special.sub(lambda m: f"{m[0][0]}{BREAK}{m[0][1:]}", _RESERVED.sub("", text))
    if found := special.search(text):
        raise ValueError(f"{found[0]!r} in a tool or its call is a special token of this tokenizer")
    return text

"""Messages with placeholders in place of their texts, to tell a template's own text from theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptsmith.chat_template.message import CALLS, SAID

# A placeholder: the number of the message, and of the text if it is not the content. Unicode
# reserves these characters for internal use. BREAK separates the characters of a special token
# that is spelled where no placeholder can be.
MARK = re.compile("\ufdd0([\\d.]+)\ufdd1")
BREAK = "\ufdd2"
_RESERVED = re.compile("[\ufdd0-\ufdd2]")
_IDENTIFIERS = ("id", "type", "tool_call_id")  # templates compare these, and need not write them

Inert = Callable[[str], str]


class MarkedMessage(NamedTuple):
    """A message as a template is handed it.

    fields   as given
    marked   with a placeholder for each text
    texts    the texts, by placeholder
    needed   the placeholders that the template must write: of what is said, with its field
    shape    what the template's text may depend on, apart from the texts
    """

    fields: dict[str, Any]
    marked: dict[str, Any]
    texts: dict[str, str]
    needed: dict[str, str]
    shape: str


class MarkedConversation(NamedTuple):
    """A conversation as a template is handed it. tools: what the assistant may call."""

    messages: Sequence[MarkedMessage]
    tools: list[Any] | None = None

    @property
    def shape(self) -> tuple[str, ...]:
        """What the template's text may depend on, apart from the texts of the messages."""
        tools = json.dumps(self.tools, ensure_ascii=False, default=str) if self.tools else ""
        return tools, *(message.shape for message in self.messages)

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [i for i, one in enumerate(self.messages) if one.marked["role"] == "assistant"]

    def before(self, i: int) -> MarkedConversation:
        return self._replace(messages=self.messages[:i])


def marked_message(i: int, message: Mapping[str, Any], inert: Inert) -> MarkedMessage:
    """Message i. inert: makes a text that has no placeholder free of special tokens."""
    role, content = message["role"], message["content"]
    if len(message) == 2:
        marked = {"role": role, "content": mark(i)}
        return MarkedMessage(dict(message), marked, {str(i): content}, {str(i): "content"}, role)
    fields, marked, texts, needed = {"role": role}, {"role": role}, {}, {}
    if content or not any(name in message for name in CALLS):
        fields["content"], marked["content"] = content, mark(i)
        texts[str(i)], needed[str(i)] = content, "content"
    else:  # templates ask whether there is anything to write before a call
        fields["content"] = marked["content"] = ""
    for name, value in message.items():
        if name in ("role", "content"):
            continue

        def placeholder(text: str, name: str = name) -> str:
            key = f"{i}.{len(texts)}"
            texts[key] = text
            if name in SAID:
                needed[key] = name
            return mark(key)

        fields[name] = replaced(value, str, inert, name)
        marked[name] = replaced(value, placeholder, inert, name)
    shape = MARK.sub("\ufdd0\ufdd1", json.dumps(marked, ensure_ascii=False, default=str))
    return MarkedMessage(fields, marked, texts, needed, shape)


def mark(key: int | str) -> str:
    return f"\ufdd0{key}\ufdd1"


def owner(found: re.Match[str]) -> int:
    """The number of the message that a placeholder belongs to."""
    return int(found[1].partition(".")[0])


def replaced(value: Any, text: Callable[[str], str], inert: Inert, name: str = "") -> Any:
    """A copy with other texts: `text(...)` of each, and `inert(...)` of names and identifiers."""
    if isinstance(value, str):
        return inert(value) if name in _IDENTIFIERS else text(value)
    if isinstance(value, Mapping):
        return {inert(str(k)): replaced(v, text, inert, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(v, text, inert) for v in value]
    return value


def broken(text: str, special: re.Pattern[str]) -> str:
    """The text without the reserved characters, and with BREAK inside each special token.

    ValueError for a special token of one character, which cannot be broken.
    """
    text = special.sub(lambda m: f"{m[0][0]}{BREAK}{m[0][1:]}", _RESERVED.sub("", text))
    if found := special.search(text):
        raise ValueError(f"{found[0]!r} in a tool or its call is a special token of this tokenizer")
    return text

"""What a chat template writes around the texts of messages.

A layout is a rendered conversation with placeholders for the texts. It depends on the shape of the
messages alone: who speaks, and which fields there are. All in it but the placeholders is the
template's own.
"""

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from gptsmith.chat_template.environment import ChatTemplateText
from gptsmith.chat_template.message import (
    THINKING,
    Message,
    handed,
    text_forms,
    with_thoughts_apart,
    without_nulls,
)
from gptsmith.chat_template.placeholders import (
    MARK,
    MarkedConversation,
    broken,
    mark,
    marked_message,
    replaced,
)

MAX_LAYOUTS = 4096  # kept; tools and calls make a new one each


class ChatLayouts:
    """The layouts of a template.

    special: matches the spelling of special tokens. tokens: variables of the template, such as
    eos_token. is_ours: see ChatTemplateText.
    """

    def __init__(
        self, source: str, special: re.Pattern[str], tokens: Mapping[str, str], is_ours: bool
    ) -> None:
        self.source, self._special, self._tokens = source, special, tokens
        self._text = ChatTemplateText(source, is_ours)
        self._layouts: dict[tuple[tuple[str, ...], bool], str] = {}
        self._reads: dict[str, bool] = {}

    def reads(self, field: str) -> bool:
        """Whether the template reads a field of this name from messages."""
        if field not in self._reads:
            name = re.escape(field)
            pattern = rf"""\.{name}\b|'{name}'|"{name}\""""
            self._reads[field] = re.search(pattern, self.source) is not None
        return self._reads[field]

    def marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> MarkedConversation:
        """Checked messages, and tools, as the template is handed them. ValueError for a field that
        it does not read though it is a part of what is said."""
        if "</think>" in self.source and self.reads("reasoning_content"):
            messages = list(map(with_thoughts_apart, messages))
        marked = [
            marked_message(
                i, handed(message, f"message {i + 1} of {len(messages)}", self.reads), self._inert
            )
            for i, message in enumerate(messages)
        ]
        given = replaced(without_nulls(tools), self._inert, self._inert) if tools else None
        return MarkedConversation(marked, given)

    def _inert(self, text: str) -> str:
        return broken(text, self._special)

    def layout(self, conversation: MarkedConversation, generate: bool) -> str:
        """generate: with the generation prompt at its end. ValueError for a template that does not
        write every text once, or does not write the tools."""
        key = conversation.shape, generate
        if key not in self._layouts:
            messages, tools = conversation
            layout = self._render([one.marked for one in messages], generate, tools)
            found = [mark[1] for mark in MARK.finditer(layout)]
            for i, one in enumerate(messages):
                for name in one.texts:
                    field, count = one.needed.get(name), found.count(name)
                    if count > 1 or (field and not count and field not in THINKING):
                        raise ValueError(
                            f"the chat template writes the {field or 'fields'} of message {i + 1} "
                            f"of {len(messages)} ({one.marked['role']}) {count} times: it must "
                            "write each once"
                        )
            if tools and layout == self.layout(MarkedConversation(messages), generate):
                raise ValueError("it has tools, which the chat template does not write")
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout
        return self._layouts[key]

    def without_thoughts(self, conversation: MarkedConversation, layout: str) -> list[int]:
        """The messages whose thoughts the template leaves out, as some do before the last turn."""
        found = {mark[1] for mark in MARK.finditer(layout)}
        return [
            i
            for i, one in enumerate(conversation.messages)
            if any(field in THINKING and name not in found for name, field in one.needed.items())
        ]

    def written(self, conversation: MarkedConversation, generate: bool) -> dict[str, str]:
        """What the template writes in place of each placeholder: the text, unchanged, trimmed, or
        escaped in JSON. ValueError naming the first message that it changes in another way."""
        messages, tools = conversation
        real, marked = [one.fields for one in messages], [one.marked for one in messages]
        layout = self.layout(conversation, generate)
        texts = {name: text for one in messages for name, text in one.texts.items()}
        answers = set(map(str, conversation.answers))
        found = _fitting(layout, self._render(real, generate, tools), texts, answers)
        if found is not None:
            return found
        changed = len(messages) - 1
        for i, one in enumerate(messages):  # which message does not fit, among placeholders?
            mixed = self._render([*marked[:i], real[i], *marked[i + 1 :]], generate, tools)
            placed = {name: mark(name) for name in texts} | one.texts
            if _fitting(layout, mixed, placed, answers) is None:
                changed = i
                break
        raise ValueError(
            f"the chat template changes the contents of messages (message {changed + 1} of "
            f"{len(messages)}, {str(real[changed]['content'])[:40]!r}) so that they cannot be "
            "distinguished from its own text"
        )

    def _render(
        self, messages: Sequence[Mapping[str, Any]], generate: bool, tools: list[Any] | None
    ) -> str:
        return self._text.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=generate,
            tools=tools,
            documents=None,
            **self._tokens,
        )


def _fitting(
    layout: str, text: str, texts: Mapping[str, str], answers: Container[str]
) -> dict[str, str] | None:
    """What the rendered text has in place of each placeholder, a form of the text that belongs
    there; None if they do not fit. answers: which texts are answers, and not escaped."""
    first, *rest = MARK.split(layout)  # text, then placeholder, text, placeholder, text ...
    if not text.startswith(first):
        return None
    at, found = len(first), {}
    for name, literal in zip(rest[::2], rest[1::2], strict=True):
        forms = text_forms(texts[name], escaped=name not in answers)
        form = next((form for form in forms if text.startswith(form + literal, at)), None)
        if form is None:
            return None
        found[name] = form
        at += len(form + literal)
    return found if at == len(text) else None

"""The layout of a conversation: what a chat template writes around the texts of messages.

A layout is a rendered conversation with placeholders instead of the texts. It depends only on the
shape of the messages: their roles and fields. Everything in it except the placeholders comes from
the template.
"""

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from gptsmith.chat_template.environment import ChatTemplateText
from gptsmith.chat_template.message import (
    REASONING,
    Message,
    split_reasoning,
    template_fields,
    text_forms,
    without_nulls,
)
from gptsmith.chat_template.placeholders import (
    PLACEHOLDER,
    MarkedConversation,
    break_special_tokens,
    marked_message,
    placeholder_for,
    replace_texts,
)

MAX_LAYOUTS = 4096  # that are cached; each set of tools or calls has its own


class ChatLayouts:
    """The layouts of a template.

    special: pattern that matches spelled-out special tokens. tokens: variables of the template,
    such as eos_token. is_ours: see ChatTemplateText.
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
        """Validated messages, and tools, with placeholders. ValueError for a content field (see
        CONTENT_FIELDS) that the template does not read."""
        if "</think>" in self.source and self.reads("reasoning_content"):
            messages = list(map(split_reasoning, messages))
        marked = [
            marked_message(
                i,
                template_fields(message, f"message {i + 1} of {len(messages)}", self.reads),
                self._escape,
            )
            for i, message in enumerate(messages)
        ]
        given = replace_texts(without_nulls(tools), self._escape, self._escape) if tools else None
        return MarkedConversation(marked, given)

    def _escape(self, text: str) -> str:
        return break_special_tokens(text, self._special)

    def layout(self, conversation: MarkedConversation, generate: bool) -> str:
        """The layout of a conversation. generate: with the generation prompt at its end. ValueError
        if the template does not write every text exactly once, or ignores the tools."""
        key = conversation.shape, generate
        if key not in self._layouts:
            messages, tools = conversation
            layout = self._render([one.marked for one in messages], generate, tools)
            found = [m[1] for m in PLACEHOLDER.finditer(layout)]
            for i, one in enumerate(messages):
                for name in one.texts:
                    field, count = one.needed.get(name), found.count(name)
                    if count > 1 or (field and not count and field not in REASONING):
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

    def missing_reasoning(self, conversation: MarkedConversation, layout: str) -> list[int]:
        """The messages whose reasoning the template omits, as some do before the last turn."""
        found = {m[1] for m in PLACEHOLDER.finditer(layout)}
        return [
            i
            for i, one in enumerate(conversation.messages)
            if any(field in REASONING and name not in found for name, field in one.needed.items())
        ]

    def written(self, conversation: MarkedConversation, generate: bool) -> dict[str, str]:
        """What the template writes for each placeholder: the text unchanged, trimmed, or escaped in
        JSON. ValueError naming the first message that it changes in another way."""
        messages, tools = conversation
        real, marked = [one.fields for one in messages], [one.marked for one in messages]
        layout = self.layout(conversation, generate)
        texts = {name: text for one in messages for name, text in one.texts.items()}
        answers = set(map(str, conversation.answers))
        found = _match_layout(layout, self._render(real, generate, tools), texts, answers)
        if found is not None:
            return found
        changed = len(messages) - 1
        for i, one in enumerate(messages):  # find the message whose text does not match
            mixed = self._render([*marked[:i], real[i], *marked[i + 1 :]], generate, tools)
            placed = {name: placeholder_for(name) for name in texts} | one.texts
            if _match_layout(layout, mixed, placed, answers) is None:
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


def _match_layout(
    layout: str, text: str, texts: Mapping[str, str], answers: Container[str]
) -> dict[str, str] | None:
    """The form (see text_forms) in which the rendered text has each placeholder's text; None if the
    text does not match the layout. answers: the texts that are answers, which are not escaped."""
    first, *rest = PLACEHOLDER.split(layout)  # text, then placeholder, text, placeholder, text ...
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

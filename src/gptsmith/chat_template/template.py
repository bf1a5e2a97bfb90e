"""Chat templates: messages to token ids and loss mask, the same for training and chatting.

The template (Jinja, `chat_template.jinja` in the run folder, as in transformers) defines what is
written around the texts of messages. Text from the template may become special tokens; the text of
a message never does. To tell them apart, the conversation is rendered once with a placeholder for
each text (layout.py): everything else comes from the template.
"""

import json
import re
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from gptsmith.chat_template.layout import MAX_LAYOUTS, ChatLayouts
from gptsmith.chat_template.message import CONTENT_FIELDS, Message, turn_starts, validated
from gptsmith.chat_template.placeholders import (
    BREAK,
    PLACEHOLDER,
    MarkedConversation,
    message_index,
)
from gptsmith.tokenizer import Tokenizer

__all__ = ["CHAT_TOKENS", "TEMPLATE", "ChatPrompt", "ChatTemplate", "Encoded", "Message"]

CHAT_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


class Encoded(NamedTuple):
    """A conversation as token ids, which of them are training targets, and the position after each
    answer that is a target."""

    ids: list[int]
    is_target: list[bool]
    ends: list[int]


class ChatPrompt(NamedTuple):
    """The ids that the model reads before it replies, and the messages they encode."""

    ids: list[int]
    messages: list[Message]


class TurnTokens(NamedTuple):
    """How to find turns in the ids of an encoded conversation.

    user, answer  the ids that begin each user message and each answer, if special tokens do
    end           the id that ends an answer, or -1 if that id also occurs where answers begin
    opening       if there is no `user`: the ids that begin a conversation and no other message
    """

    user: list[int]
    answer: list[int]
    end: int
    opening: list[int]


class ReasoningOmittedError(ValueError):
    """The template omits the reasoning of an answer that is a target. message: its index."""

    def __init__(self, message: int, of: int) -> None:
        super().__init__(
            f"the chat template leaves out the reasoning_content of message {message + 1} of {of}: "
            "the model would not learn it"
        )
        self.message = message


class ChatTemplate:
    """A Jinja chat template with the tokenizer that has its special tokens.

    stop_ids   ids that end an answer: the special token after its content, and the end of text

    ValueError for invalid Jinja, and for a template that ends answers without a special token.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source = source
        self.tokenizer = tokenizer
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        self._layouts = ChatLayouts(
            source, self._special, tokenizer.roles.names, is_ours=source == TEMPLATE
        )
        document = json.loads(tokenizer.to_json())
        added = document.get("added_tokens") or []
        self._lstrip_tokens = {token["content"] for token in added if token.get("lstrip")}
        self._rstrip_tokens = {token["content"] for token in added if token.get("rstrip")}
        # SentencePiece adds a space before the first piece of a text only.
        self._marks_first = (document.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
        self._spans: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        self.stop_ids: tuple[int, ...] = ()
        twice = self.layout(("user", "assistant") * 2)
        ends = [self._end(twice, i, 0)[1] for i in (1, 3)]
        self.stop_ids = tuple(dict.fromkeys([*ends, *tokenizer.special_ids.eos_ids]))

    def __repr__(self) -> str:
        return f"ChatTemplate({len(self.source):,} characters, stop_ids {list(self.stop_ids)})"

    def encode(
        self,
        messages: Sequence[Message],
        *,
        targets: Container[int] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Encoded:
        """Encode a whole conversation. The targets are the answers, each with its end token.

        targets: indices of the messages that are targets (default: all of the assistant's).
        tools: what the assistant may call, in the format that the template reads.

        Adjacent text of template and content is encoded as one text, as in transformers. Where an
        answer begins inside such a text, every token with a character of the answer is a target:
        from the first one that differs from the encoding of the preceding text alone.
        ValueError for messages without an answer, and for whatever `prompt` rejects.
        """
        marked = self._layouts.marked(validated(messages), tools)
        if not marked.answers:
            raise ValueError("the conversation has no assistant message: nothing to learn from it")
        layout = self._layouts.layout(marked, False)
        for i in self._layouts.missing_reasoning(marked, layout):
            if targets is None or i in targets:
                raise ReasoningOmittedError(i, len(messages))
        texts = self._layouts.written(marked, False)
        ids: list[int] = []
        is_target: list[bool] = []
        at, ends = 0, []
        for i, (start, end) in zip(marked.answers, self._answers(marked), strict=True):
            before = self._ids(layout[at:start], texts, at == 0)
            if self._special.match(layout, start):
                new, known = before + self._ids(layout[start:end], texts), len(before)
            else:
                new = self._ids(layout[at:end], texts, at == 0)
                pairs = enumerate(zip(before, new, strict=False))
                known = next((i for i, (a, b) in pairs if a != b), min(len(before), len(new)))
            ids += new
            learn = targets is None or i in targets
            is_target += [False] * known + [learn] * (len(new) - known)
            if learn:
                ends.append(len(ids) + 1)  # the end token comes next
            at = end
        ids += self._ids(layout[at:], texts)
        is_target += [False] * (len(ids) - len(is_target))
        for end in ends:
            is_target[end - 1] = True
        return Encoded(ids, is_target, ends)

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """The ids that the model reads before it answers the last message, which is the user's or
        the result of a tool.

        ValueError for no messages, unknown roles, contents that are not text, and a template that
        rejects the conversation, omits a part of it, or changes texts other than by trimming or
        escaping them.
        """
        messages = validated(messages)
        if messages[-1]["role"] not in ("user", "tool"):
            raise ValueError(f"the last message is the {messages[-1]['role']}'s, not the user's")
        marked = self._layouts.marked(messages, tools)
        layout = self._layouts.layout(marked, True)
        return self._ids(layout, self._layouts.written(marked, True), True)

    def truncate(self, messages: Sequence[Message], limit: int) -> ChatPrompt:
        """The prompt of the system message and as many of the last turns as fit into `limit` ids.

        For turns, see turn_starts. ValueError if the last one alone is too long.
        """
        messages = validated(messages)
        starts = turn_starts(messages) or [0]
        system = messages[: starts[0]]
        for i in starts:
            kept = system + messages[i:]
            ids = self.prompt(kept)
            if len(ids) <= limit:
                return ChatPrompt(ids, kept)
        raise ValueError(
            f"the last message takes {len(ids)} tokens, including what the template adds"
            f"{' and the system message' if system else ''}, but only {limit} fit: shorten it"
        )

    def check_prefix_preserving(self) -> None:
        """ValueError unless the model sees the same tokens in chats as in training: the prompt for
        an answer must be a prefix of the encoded conversation that ends with that answer."""
        word = self.word()
        messages = [Message(role=role, content=word) for role in ("user", "assistant") * 2]
        ids = self.encode(messages).ids
        for k in (1, 3):
            prompt = self.prompt(messages[:k])
            if ids[: len(prompt)] != prompt:
                raise ValueError(
                    f"the chat template differs between training and chatting: its prompt ends "
                    f"with {self.tokenizer.decode(prompt[-5:])!r}, which becomes other tokens"
                    " once an answer follows; end the generation prompt with a special token"
                )

    def ignored_fields(self, messages: Sequence[Message]) -> list[str]:
        """The fields of messages that the template does not read, sorted. Not those that it reads
        under another name, and identifiers."""
        names = {name for message in messages for name in message}
        names -= {"role", "content", "tool_call_id", *CONTENT_FIELDS}
        return sorted(name for name in names if not self._layouts.reads(name))

    def layout(self, roles: tuple[str, ...], generate: bool = False) -> str:
        """A conversation of these roles, with U+FDD0, index, U+FDD1 in place of each content.

        generate: with the generation prompt at its end. ValueError if the template does not write
        every content exactly once.
        """
        plain = [Message(role=role, content="") for role in roles]
        return self._layouts.layout(self._layouts.marked(plain), generate)

    def turn_tokens(self) -> TurnTokens:
        """How to find turns in the ids of conversations that this template encodes."""
        layout = self.layout(("user", "assistant", "user"))
        first, answer, question = PLACEHOLDER.finditer(layout)
        opening, at = [], 0
        while at < first.start() and (found := self._special.match(layout, at)):
            opening.append(self.tokenizer.special_tokens[found[0]])
            at = found.end()
        end, stop = self._end(layout, 1, answer.end())
        special = list(self._special.finditer(layout, end, question.start()))[1:]
        user = layout[special[0].start() : question.start()] if special else ""
        header = self._generation_prompt if self._special.match(self._generation_prompt) else ""
        ids, begin = (self._ids(text.rstrip(), {}) for text in (user, header))
        return TurnTokens(ids, begin, -1 if stop in begin else stop, [] if ids else opening)

    def _answers(self, marked: MarkedConversation) -> list[tuple[int, int]]:
        """Where each answer is in the layout: from its generation prompt to its end token."""
        key = marked.shape
        if key in self._spans:
            return self._spans[key]
        layout, spans = self._layouts.layout(marked, False), []
        for i in marked.answers:
            if i == 0:  # templates may fail on a conversation without messages
                text = next(PLACEHOLDER.finditer(layout)).start()
                start = layout.rfind(self._generation_prompt, 0, text)
                prompt = layout[:text] if start >= 0 else self._generation_prompt
            else:
                before, prompt = (
                    self._layouts.layout(marked.before(i), generate) for generate in (False, True)
                )
                start = self._shared_length(before, prompt)
            if not layout.startswith(prompt):
                raise ValueError(_mismatch(layout, prompt, i, len(marked.messages)))
            spans.append((start, self._end(layout, i, len(prompt))[0]))
        if len(self._spans) >= MAX_LAYOUTS:
            self._spans.clear()
        self._spans[key] = spans
        return spans

    @cached_property
    def _generation_prompt(self) -> str:
        """The text that begins an answer."""
        before, prompt = (self.layout(("user",), generate) for generate in (False, True))
        return prompt[self._shared_length(before, prompt) :]

    def _shared_length(self, a: str, b: str) -> int:
        """Length of the common prefix of two layouts: all of the first or, where a template closes
        a conversation, whole special tokens and texts."""
        if b.startswith(a):
            return len(a)
        length = 0
        for x, y in zip(self._special.split(a), self._special.split(b), strict=False):
            if x != y:
                break
            length += len(x)
        return length

    def _end(self, layout: str, i: int, start: int) -> tuple[int, int]:
        """Position in the layout of the special token that ends answer i, and its id.

        start: where the answer's text begins. The token is the first one in stop_ids after the
        answer's last placeholder, or else the first special token there.
        """
        marks = list(PLACEHOLDER.finditer(layout, start))
        own = [m.end() for m in marks if message_index(m) == i]
        at = max(own, default=start)
        limit = next((m.start() for m in marks if m.start() >= at), len(layout))
        ends = [(m.start(), self.tokenizer.special_tokens[m[0]])
                for m in self._special.finditer(layout, at, limit)]  # fmt: skip
        if not ends:
            raise ValueError(
                f"no special token ends an answer under this chat template "
                f"({layout[at:limit][:40]!r} does): a model would never learn to stop; add the "
                "template's tokens to the tokenizer"
            )
        return next((end for end in ends if end[1] in self.stop_ids), ends[0])

    # Tokens

    def _ids(self, layout: str, written: Mapping[str, str], first: bool = False) -> list[int]:
        """Ids of a part of a layout, with `written` for its placeholders. first: it starts the
        conversation."""
        pieces = self._special.split(layout)  # text, special token, text, special token, text ...
        texts = [
            PLACEHOLDER.sub(lambda m: written[m[1]], text.replace(BREAK, ""))
            for text in pieces[::2]
        ]
        for i, name in enumerate(pieces[1::2]):  # special tokens that absorb white space
            texts[i] = texts[i].rstrip() if name in self._lstrip_tokens else texts[i]
            texts[i + 1] = texts[i + 1].lstrip() if name in self._rstrip_tokens else texts[i + 1]
        encoded = self.tokenizer.encode_batch(texts)
        if self._marks_first:  # as transformers does: encode after a newline, then remove it
            newline = self.tokenizer.encode("\n")
            behind = self.tokenizer.encode_batch([f"\n{text}" for text in texts])
            for i in range(1 if first else 0, len(texts)):
                if behind[i][: len(newline)] == newline:
                    encoded[i] = behind[i][len(newline) :]
        ids = encoded[0]
        for name, text in zip(pieces[1::2], encoded[1:], strict=True):
            ids += [self.tokenizer.special_tokens[name], *text]
        return ids

    def word(self) -> str:
        """A word of the vocabulary, which, unlike a fixed text, any tokenizer can encode."""
        for i in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode([i])
            if text.isalpha() and "\ufffd" not in text:
                return text
        raise ValueError("the tokenizer has no token made of letters")


def tuning_template(tokenizer: Tokenizer, source: str | None) -> ChatTemplate:
    """The template for chat tuning: the given source, or by default the built-in template, whose
    special tokens are added to the tokenizer."""
    if source is None:
        source = opening(tokenizer) + TEMPLATE
        tokenizer = tokenizer.add_special_tokens(CHAT_TOKENS)
    return ChatTemplate(source, tokenizer)


def opening(tokenizer: Tokenizer) -> str:
    """A Jinja statement that writes the tokens that the tokenizer puts before a text, if any."""
    text = "".join(tokenizer.decode([i]) for i in tokenizer.prefix)
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}\n" if text else ""


def _mismatch(layout: str, prompt: str, i: int, n: int) -> str:
    """Why the prompt for answer i is not a prefix of the whole conversation's layout."""
    pairs = enumerate(zip(layout, prompt, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), len(layout))
    changed = next((message_index(m) for m in PLACEHOLDER.finditer(prompt) if m.end() > at), None)
    if changed is not None:
        return (
            f"the chat template changes message {changed + 1} of {n} once more messages follow: as "
            f"training would show it, it is not what the model sees when it writes message {i + 1}"
        )
    return (
        "the chat template differs between training and chatting: the prompt for message "
        f"{i + 1} of {n} differs from the text before it in the whole conversation"
    )

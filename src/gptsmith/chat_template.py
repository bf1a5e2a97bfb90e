"""From messages to token ids and loss mask: one template for training and chatting.

The template (Jinja, `chat_template.jinja` in the run folder, in the form that transformers reads)
defines the text around the contents of the messages. What the template writes may become special
tokens; the content of a message never does. To tell the two apart, the conversation is rendered
once with a placeholder for each content: all other text is the template's own.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, TypedDict

from gptsmith.template_environment import ChatTemplateText
from gptsmith.tokenizer import BEGINNINGS, Tokenizer

ROLES = ("system", "user", "assistant")
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

_MARK = re.compile("\ufdd0(\\d+)\ufdd1")  # a placeholder; Unicode reserves both characters


class Message(TypedDict):
    role: str
    """system, user or assistant"""
    content: str
    """Text; lists of `{"type": "text", "text": ...}`, as some data sets have, are joined."""


class Encoded(NamedTuple):
    """A conversation as token ids, and which of them are training targets: the answers."""

    ids: list[int]
    is_target: list[bool]


class ChatPrompt(NamedTuple):
    """What the model reads before it replies, and the messages it was made from."""

    ids: list[int]
    messages: list[Message]


class ChatTemplate:
    """A Jinja chat template with the tokenizer that has its special tokens.

    stop_ids   what ends an answer: the special token after its content, and the end of text

    Templates may come from anyone: see template_environment.py.
    ValueError for invalid Jinja, and for a template without a special token at the end of answers.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source = source
        self._tokenizer = tokenizer
        self._text = ChatTemplateText(source, is_ours=source == TEMPLATE)
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        names = {i: name for name, i in tokenizer.special_tokens.items()}
        eos = _eos_id(tokenizer)
        self._tokens = {"eos_token": names[eos]} if eos is not None else {}
        for name in BEGINNINGS[::-1]:
            if name in tokenizer.special_tokens:
                self._tokens["bos_token"] = name
        document = json.loads(tokenizer.to_json())
        added = document.get("added_tokens") or []
        self._lstrip_tokens = {token["content"] for token in added if token.get("lstrip")}
        self._rstrip_tokens = {token["content"] for token in added if token.get("rstrip")}
        # SentencePiece puts a space before the first piece of a text, and before no other.
        self._marks_first = (document.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
        self._layouts: dict[tuple[tuple[str, ...], bool], str] = {}
        self._spans: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        twice = ("user", "assistant") * 2
        ends = [self._end(self.layout(twice), i)[1] for i in (1, 3)]
        self.stop_ids = tuple(dict.fromkeys([*ends, *([] if eos is None else [eos])]))

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The whole conversation; each answer is a target with its generation prompt and its end.

        Adjacent text of template and content is encoded as one text, as transformers does. Where
        an answer begins inside such a text, every token with a character of the answer is a target:
        from the first one that differs from the encoding of the text before the answer alone.
        ValueError for messages without an answer, and for whatever `prompt` refuses.
        """
        messages = _checked(messages)
        roles = tuple(message["role"] for message in messages)
        if "assistant" not in roles:
            raise ValueError("the conversation has no assistant message: nothing to learn from it")
        layout = self.layout(roles)
        contents = self._contents(layout, messages, generate=False)
        ids: list[int] = []
        is_target: list[bool] = []
        at, ends = 0, []
        for start, end in self._answers(roles):
            before = self._ids(layout[at:start], contents, at == 0)
            if self._special.match(layout, start):
                new, known = before + self._ids(layout[start:end], contents), len(before)
            else:
                new = self._ids(layout[at:end], contents, at == 0)
                pairs = enumerate(zip(before, new, strict=False))
                known = next((i for i, (a, b) in pairs if a != b), min(len(before), len(new)))
            ids += new
            is_target += [False] * known + [True] * (len(new) - known)
            ends.append(len(ids))  # where the end token will be
            at = end
        ids += self._ids(layout[at:], contents)
        is_target += [False] * (len(ids) - len(is_target))
        for i in ends:
            is_target[i] = True
        return Encoded(ids, is_target)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model reads before it answers the last message, which is the user's.

        ValueError for no messages, unknown roles, contents that are not text, and a template that
        refuses the conversation or changes contents by more than trimming white space.
        """
        messages = _checked(messages)
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message is the {messages[-1]['role']}'s, not the user's")
        layout = self.layout(tuple(message["role"] for message in messages), generate=True)
        return self._ids(layout, self._contents(layout, messages, generate=True), True)

    def truncate(self, messages: Sequence[Message], limit: int) -> ChatPrompt:
        """The prompt of the newest turns that take at most `limit` tokens, system message included.

        A turn is a user message and what follows it. ValueError if the last one is too long.
        """
        messages = _checked(messages)
        first = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
        system, rest = messages[:first], messages[first:]
        turns = [i for i, message in enumerate(rest) if i == 0 or message["role"] == "user"]
        for i in turns:
            kept = system + rest[i:]
            ids = self.prompt(kept)
            if len(ids) <= limit:
                return ChatPrompt(ids, kept)
        raise ValueError(
            f"the last message takes {len(ids)} tokens, including what the template adds"
            f"{' and the system message' if system else ''}, but only {limit} fit: shorten it"
        )

    def check_prefix_preserving(self) -> None:
        """ValueError if chatting would give the model other tokens than training did: the prompt
        for an answer must be a prefix of the conversation that ends with that answer."""
        word = self.word()
        messages = [Message(role=role, content=word) for role in ("user", "assistant") * 2]
        ids = self.encode(messages).ids
        for k in (1, 3):
            prompt = self.prompt(messages[:k])
            if ids[: len(prompt)] != prompt:
                raise ValueError(
                    f"the chat template differs between training and chatting: its prompt ends "
                    f"with {self._tokenizer.decode(prompt[-5:])!r}, which becomes other tokens"
                    " once an answer follows; end the generation prompt with a special token"
                )

    # Rendering. A layout is the rendered conversation with placeholders for the contents; it
    # depends on the roles alone.

    def layout(self, roles: tuple[str, ...], generate: bool = False) -> str:
        """The conversation with U+FDD0, number, U+FDD1 in place of each message's content.

        generate: with the generation prompt at its end. ValueError for a template that does not
        write every content exactly once.
        """
        if (roles, generate) not in self._layouts:
            marked = [Message(role=r, content=f"\ufdd0{i}\ufdd1") for i, r in enumerate(roles)]
            layout = self._render(marked, generate)
            found = [int(i) for i in _MARK.findall(layout)]
            for i, role in enumerate(roles):
                if found.count(i) != 1:
                    raise ValueError(
                        f"the chat template writes the content of message {i + 1} of {len(roles)} "
                        f"({role}) {found.count(i)} times: it must write each once"
                    )
            self._layouts[roles, generate] = layout
        return self._layouts[roles, generate]

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        return self._text.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=generate,
            tools=None,
            documents=None,
            **self._tokens,
        )

    def _answers(self, roles: tuple[str, ...]) -> list[tuple[int, int]]:
        """Where each answer is in the layout: from its generation prompt to its end token."""
        if roles not in self._spans:
            layout, spans = self.layout(roles), []
            for i in (i for i, role in enumerate(roles) if role == "assistant"):
                before, prompt = self.layout(roles[:i]), self.layout(roles[:i], generate=True)
                if not layout.startswith(prompt):
                    raise ValueError(
                        "the chat template differs between training and chatting: the prompt for "
                        f"message {i + 1} of {len(roles)} differs from the text before it in the "
                        "whole conversation"
                    )
                start = len(before)
                if not prompt.startswith(before):  # the template closes a conversation
                    start = self._common(before, prompt)
                spans.append((start, self._end(layout, i)[0]))
            self._spans[roles] = spans
        return self._spans[roles]

    def _common(self, a: str, b: str) -> int:
        """Length of the common prefix of two layouts, in whole special tokens and texts."""
        length = 0
        for x, y in zip(self._special.split(a), self._special.split(b), strict=False):
            if x != y:
                break
            length += len(x)
        return length

    def _end(self, layout: str, i: int) -> tuple[int, int]:
        """Position in the layout of the special token that ends answer i, and its id."""
        content = next(mark for mark in _MARK.finditer(layout) if int(mark[1]) == i)
        following = _MARK.search(layout, content.end())
        limit = following.start() if following else len(layout)
        end = self._special.search(layout, content.end(), limit)
        if end is None:
            text = layout[content.end() : limit]
            raise ValueError(
                f"no special token ends an answer under this chat template ({text[:40]!r} does): a "
                "model would never learn to stop; add the template's tokens to the tokenizer"
            )
        return end.start(), self._tokenizer.special_tokens[end[0]]

    def _contents(self, layout: str, messages: Sequence[Message], generate: bool) -> list[str]:
        """The contents as the template writes them: unchanged, or trimmed."""
        text = self._render(messages, generate)
        contents = [message["content"] for message in messages]
        first, *rest = _MARK.split(layout)  # text, then number, text, number, text ...
        at = len(first) if text.startswith(first) else len(text) + 1
        for i, literal in zip(map(int, rest[::2]), rest[1::2], strict=True):
            whole = contents[i]
            forms = [whole, whole.strip(), whole.lstrip(), whole.rstrip()]
            forms += [whole.strip("\n"), whole.lstrip("\n")]
            matching = [form for form in forms if text.startswith(form + literal, at)]
            if not matching:
                _refuse_changes(i, messages)
            contents[i] = matching[0]
            at += len(matching[0] + literal)
        if at != len(text):
            _refuse_changes(len(messages) - 1, messages)
        return contents

    # Tokens

    def _ids(self, layout: str, contents: Sequence[str], first: bool = False) -> list[int]:
        """Ids of a part of a layout. first: it starts the conversation."""
        pieces = self._special.split(layout)  # text, special token, text, special token, text ...
        texts = [_MARK.sub(lambda mark: contents[int(mark[1])], text) for text in pieces[::2]]
        for i, name in enumerate(pieces[1::2]):  # special tokens that absorb white space
            texts[i] = texts[i].rstrip() if name in self._lstrip_tokens else texts[i]
            texts[i + 1] = texts[i + 1].lstrip() if name in self._rstrip_tokens else texts[i + 1]
        encoded = self._tokenizer.encode_batch(texts)
        if self._marks_first:  # as transformers does: encode after a newline, then remove it
            newline = self._tokenizer.encode("\n")
            behind = self._tokenizer.encode_batch([f"\n{text}" for text in texts])
            for i in range(1 if first else 0, len(texts)):
                if behind[i][: len(newline)] == newline:
                    encoded[i] = behind[i][len(newline) :]
        ids = encoded[0]
        for name, text in zip(pieces[1::2], encoded[1:], strict=True):
            ids += [self._tokenizer.special_tokens[name], *text]
        return ids

    def word(self) -> str:
        """A word of the vocabulary: unlike fixed text, any tokenizer can encode it."""
        for i in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode([i])
            if text.isalpha() and "\ufffd" not in text:
                return text
        raise ValueError("the tokenizer has no token made of letters")


def chat_tokenizer(tokenizer: Tokenizer, source: str | None) -> tuple[Tokenizer, ChatTemplate]:
    """Tokenizer and template for chat tuning: the given template, or the default one with its
    special tokens added to the tokenizer."""
    if source is None:
        source, tokenizer = TEMPLATE, tokenizer.add_special_tokens(CHAT_TOKENS)
    return tokenizer, ChatTemplate(source, tokenizer)


def _checked(messages: Sequence[Message]) -> list[Message]:
    """The messages with their contents as plain strings. ValueError for invalid messages."""
    if not messages:
        raise ValueError("the conversation has no messages")
    plain = []
    for i, message in enumerate(messages):
        place = f"message {i + 1} of {len(messages)}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'{place}: expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"{place}: unknown role {str(role)[:40]!r}; use {', '.join(ROLES)}")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
                raise ValueError(f"{place}: its content has parts that are not text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            kind = type(content).__name__
            raise ValueError(f"{place}: its content is not text but {kind} {str(content)[:40]}")
        plain.append(Message(role=role, content=content))
    return plain


def _refuse_changes(i: int, messages: Sequence[Message]) -> NoReturn:
    raise ValueError(
        f"the chat template changes the contents of messages (message {i + 1} of {len(messages)}, "
        f"{messages[i]['content'][:40]!r}) so that they cannot be distinguished from its own text"
    )


def _eos_id(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.eos_id
    except ValueError:  # it has none
        return None

"""Conversations, the built-in template over bytes, and the texts of its targets."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import tokenizers

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.data.examples import Example
from gptsmith.tokenizer import Tokenizer

BYTES = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
OURS = ChatTemplate(TEMPLATE, BYTES)


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation that the user begins."""
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    return turns if system is None else [Message(role="system", content=system), *turns]


def said(turns: str, *contents: str) -> list[Message]:
    """A conversation of these roles, by their first letters: s, u, a."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    texts = contents or tuple(f"{letter}{i}" for i, letter in enumerate(turns))
    return [Message(role=roles[r], content=c) for r, c in zip(turns, texts, strict=True)]


def stock(tokenizer: Tokenizer, source: str, **names: str) -> Any:
    """The same tokenizer and template in the hands of transformers."""
    from transformers import PreTrainedTokenizerFast

    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    theirs = PreTrainedTokenizerFast(tokenizer_object=reference, **names)
    theirs.chat_template = source
    return theirs


def stock_ids(theirs: Any, messages: Sequence[Any], prompt: bool = False, tools: Any = None) -> Any:
    return theirs.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=prompt, tools=tools
    )


def learned(
    ids: Sequence[int], is_target: Sequence[Any], tokenizer: Tokenizer = BYTES
) -> list[str]:
    """The runs of targets as text."""
    pairs = groupby(zip(ids, is_target, strict=True), key=lambda pair: bool(pair[1]))
    return [tokenizer.decode([int(i) for i, _ in run]) for is_run, run in pairs if is_run]


def target_texts(example: Example, tokenizer: Tokenizer = BYTES) -> list[str]:
    is_target = example.labels != IGNORE_INDEX
    assert (example.labels == example.ids)[is_target].all()
    return learned(example.ids.tolist(), is_target.tolist(), tokenizer)

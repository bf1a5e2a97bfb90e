"""Incremental decoding: text from token ids that arrive one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptsmith.tokenizer.tokenizer import Tokenizer

_CONTEXT = 4  # preceding tokens that are decoded together with the new ones
_MAX_HELD = 64  # ids whose text may be held back


class TokenStream:
    """Decodes ids one at a time, as the continuation of a prompt.

    The returned pieces concatenate to decode(prompt + ids) minus decode(prompt), and no character
    is split. The text of a token depends on what precedes it: a decoder may drop the first space
    of a text, or put spaces between words. So new ids are decoded together with the last few
    before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._fixed_bytes = tokenizer.has_fixed_bytes
        self._ids: list[int] = []  # decoded together: context, then ids held back
        self._sent = ""  # the part of their text that was returned
        special = set(tokenizer.special_tokens.values())
        if self._fixed_bytes:  # the prompt may end inside a character
            self._utf8.decode(tokenizer.decode_bytes(prompt[-_CONTEXT:]))
            return
        for i in reversed(prompt):
            joined = i in tokenizer.byte_ids and len(self._ids) < _MAX_HELD
            if len(self._ids) >= _CONTEXT and not joined:
                break
            if i not in special:  # special tokens of a prompt are not text
                self._ids.insert(0, int(i))
        self._sent = tokenizer.decode(self._ids)

    def push(self, token_id: int) -> str:
        """The text that is final after this id; may be empty."""
        if self._fixed_bytes:
            return self._utf8.decode(self._tokenizer.piece(token_id))
        self._ids.append(token_id)
        # SentencePiece's byte tokens decode to characters only once the sequence is complete.
        if token_id in self._tokenizer.byte_ids and len(self._ids) < _MAX_HELD:
            return ""
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < _MAX_HELD:
            return ""
        return self._send(text)

    def flush(self) -> str:
        """The text held back so far; resets the stream."""
        if self._fixed_bytes:
            rest = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return rest
        rest = self._send(self._tokenizer.decode(self._ids))
        self._ids, self._sent = [], ""
        return rest

    def _send(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._ids = self._ids[-_CONTEXT:]
        self._sent = self._tokenizer.decode(self._ids)
        return new

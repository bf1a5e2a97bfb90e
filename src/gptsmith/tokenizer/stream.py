"""Text from token ids that arrive one at a time."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptsmith.tokenizer.tokenizer import Tokenizer


class TokenStream:
    """Decodes ids one at a time; no character is split, and the pieces add up to decode(ids)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """The text that is complete after this id; may be empty."""
        if self._tokenizer._exact:
            return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._send(text)

    def flush(self) -> str:
        """The text held back so far; afterwards the stream starts anew."""
        if self._tokenizer._exact:
            rest = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return rest
        rest = self._send(self._tokenizer.decode(self._ids))
        self._ids, self._sent = [], ""
        return rest

    def _send(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent = text
        return new

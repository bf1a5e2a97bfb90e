"""Text of a generation as its tokens arrive, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer


class StopStrings:
    """Passes text through until a stop string is complete.

    Text that may turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.stopped = False
        self.held = ""

    def push(self, piece: str, last: bool = False) -> str:
        """The text that is certain after this piece; the stop string completed first ends it."""
        if self.stopped:
            return ""
        text = self.held + piece
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        longest = 0 if last else min(len(text), max(map(len, self.stop), default=1) - 1)
        keep = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Detokenizer:
    """Incremental decoding: pieces of text that never end inside a character or a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = tokenizer.stream()
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stop.stopped

    def push(self, token: int) -> str:
        """The text that is certain after this token; may be empty."""
        return self._stop.push(self._stream.push(token))

    def flush(self) -> str:
        """The text held back so far, when no token follows."""
        return self._stop.push(self._stream.flush(), last=True)

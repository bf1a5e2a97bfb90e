"""Guesses of the next tokens, so that one pass can read several at once.

A guess counts only where the request's own sampling gives it, so it changes no text. Source: prompt
lookup decoding (Saxena 2023), a speculation (Leviathan et al. 2023) without a second model.
"""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """Guesses that a text goes on as it did the last time that its newest three tokens occurred."""

    _N = 3

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on behind three tokens
        self._known = 0

    def guess(self, text: Sequence[int], count: int) -> Sequence[int]:
        """At most `count` tokens; text: that of the last call, longer, or another, shorter one."""
        if len(text) < self._known:
            self.__init__()  # type: ignore[misc]
        for at in range(max(self._known, self._N), len(text)):
            self._after[tuple(text[at - self._N : at])] = at
        self._known = max(self._known, len(text))
        found = self._after.get(tuple(text[-self._N :]))
        if found is None:
            return ()
        period = len(text) - found  # at its end, the guess repeats itself
        return [text[found + i % period] for i in range(count)]

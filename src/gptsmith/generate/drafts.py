"""Draft tokens for speculative decoding: guesses of the next tokens, which one pass verifies.

A draft token is accepted only where the request's own sampling chooses it, so the output does not
change. Source: prompt lookup decoding (Saxena 2023), speculative decoding (Leviathan et al. 2023)
without a draft model; with one: draft_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """Continues a sequence as it continued when its last three tokens occurred before."""

    _N = 3

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # index after them
        self._known = 0

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        """At most `count` draft tokens. tokens: those of the last call with others appended, or a
        shorter sequence, for which everything is forgotten."""
        if len(tokens) < self._known:
            self.__init__()  # type: ignore[misc]
        for at in range(max(self._known, self._N), len(tokens)):
            self._after[tuple(tokens[at - self._N : at])] = at
        self._known = max(self._known, len(tokens))
        found = self._after.get(tuple(tokens[-self._N :]))
        if found is None:
            return ()
        period = len(tokens) - found  # beyond the end, the draft repeats itself
        return [tokens[found + i % period] for i in range(count)]


class DraftLength:
    """How many draft tokens to verify: more after drafts that were accepted, fewer after others,
    and none for some steps while none is accepted."""

    _MAX_PAUSE = 64

    def __init__(self) -> None:
        self._length, self._pause, self._waited = 2, 1, 0

    def next(self, most: int) -> int:
        """At most `most`; called once a step."""
        if self._waited:
            self._waited -= 1
            return 0
        return min(most, self._length)

    def record(self, offered: int, accepted: int) -> None:
        """So many tokens of a draft were accepted."""
        if accepted:
            self._length, self._pause = (2 * accepted if accepted == offered else accepted) + 1, 1
        elif offered and self._length > 1:
            self._length //= 2
        elif offered:
            self._pause = min(2 * self._pause, self._MAX_PAUSE)
            self._waited = self._pause

"""Draft tokens for speculative decoding: guesses of the next tokens, which one pass verifies.

A draft token is accepted only where the request's own sampling chooses it, so the output does not
change. Source: prompt lookup decoding (Saxena 2023), speculative decoding (Leviathan et al. 2023)
without a draft model.
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

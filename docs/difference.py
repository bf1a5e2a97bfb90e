"""What differs between the output that a page shows and a new one."""

import re
from collections.abc import Sequence
from itertools import zip_longest

# Lines that come with the clock.
PROGRESS = re.compile(r"step [\d,]+(/[\d,]+)? · |preparing: |\w[\w ()-]*: [\d,]+ of [\d,]+$")
_MACHINE = re.compile(r"precision: |torch\.compile: |training: .*shortened")

_NUMBER = re.compile(r"\b[0-9a-f]{12,}\b|[+-]?\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?")
_UNIT = re.compile(r"(?<=0) ?(?:B|[kKMG]i?B|[mu]?s|min|h)\b")
_PLURAL = re.compile(r"(?<=0 )([a-z]+)s\b")
_RULES = re.compile(r"[─-╿▀-▟]+")  # box drawing and blocks


def difference(expected: str, printed: str) -> tuple[str, str] | None:
    """The first lines that differ, of what a page shows and of what was printed; None if the same
    words are in the same order, apart from numbers, units and progress.

    Where a page has a line `...`, any words may have been printed.
    """
    first, *others = (_words(part) for part in re.split(r"^\.\.\.$", expected, flags=re.MULTILINE))
    new = _words(printed)
    if not others:
        return _first(first, new)
    if found := _first(first, new[: len(first)]):
        return found
    rest = new[len(first) :]
    for part in others[:-1]:
        words = [word for word, _ in part]
        starts = range(len(rest) - len(words) + 1)
        at = next((i for i in starts if [w for w, _ in rest[i : i + len(words)]] == words), None)
        if at is None:
            return part[0][1], "(these words are not there)"
        rest = rest[at + len(words) :]
    last = others[-1]
    return _first(last, rest[len(rest) - len(last) :] if len(last) <= len(rest) else rest)


def _words(text: str) -> list[tuple[str, str]]:
    """Each word without numbers, and its line. Equal lines in a row count as one: how many
    checkpoints there are depends on the clock."""
    words: list[tuple[str, str]] = []
    before = ""
    for line in text.splitlines():
        masked = _UNIT.sub("", _NUMBER.sub("0", _RULES.sub(" ", line)))
        masked = _PLURAL.sub(r"\1", masked)
        masked = " ".join(masked.split())
        if not PROGRESS.match(line) and not _MACHINE.match(line) and masked != before:
            words += [(word, line) for word in masked.split()]
            before = masked
    return words


def _first(
    old: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]]
) -> tuple[str, str] | None:
    """The lines of the first words that differ."""
    for (a, line), (b, other) in zip_longest(old, new, fillvalue=("", "")):
        if a != b:
            return line, other
    return None

"""Arguments that Python would take for something else without a word."""

import os
from collections.abc import Mapping


def check_several(values: object, name: str) -> None:
    """ValueError for one text, path or message where several are expected: a string would be read
    character by character, a message key by key."""
    if isinstance(values, str | bytes | Mapping | os.PathLike):
        shown = repr(values)
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        raise ValueError(f"{name}={shown} is one, and several are expected: give a list, [...]")

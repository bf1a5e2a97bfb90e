"""Reject a single value where several are expected, which Python would silently iterate over."""

import os
from collections.abc import Mapping


def check_several(values: object, name: str) -> None:
    """ValueError if `values` is one text, path or message instead of several: a string would be
    iterated by characters, a message by its keys."""
    if isinstance(values, str | bytes | Mapping | os.PathLike):
        shown = repr(values)
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        raise ValueError(f"{name}={shown} is one value, several are expected: give a list, [...]")

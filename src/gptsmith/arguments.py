"""Check arguments that Python would silently misread: one value where several are expected, and
what is not a sequence of token ids."""

import operator
import os
from collections.abc import Mapping
from typing import Any


def check_several(values: object, name: str) -> None:
    """ValueError if `values` is one text, path or message instead of several: a string would be
    iterated by characters, a message by its keys."""
    if isinstance(values, str | bytes | Mapping | os.PathLike):
        raise ValueError(
            f"{name}={_shown(values)} is one value, several are expected: give a list, [...]"
        )


def token_ids(values: Any, name: str = "ids") -> list[int]:
    """The ids in a sequence, an array or a tensor. ValueError for anything else, such as text,
    fractions or several rows."""
    try:
        if not isinstance(values, str | bytes | Mapping):
            rows = values.tolist() if hasattr(values, "tolist") else values
            return [operator.index(i) for i in rows]
    except TypeError:
        pass
    raise ValueError(f"{name}={_shown(values)}: expected one sequence of token ids, integers")


def _shown(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:59]}…"

"""Cells of tables: what counts as empty, and which values are text."""

from __future__ import annotations

from datetime import date, time
from decimal import Decimal
from typing import Any

from gptsmith.chat_template.message import is_empty


def cell_text(value: Any) -> str:
    """The text of a cell: numbers, dates and truth values as they are written, "" if it is empty.

    ValueError for anything else, such as a list.
    """
    if is_empty(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float | Decimal | date | time):
        return str(value)
    raise ValueError(f"holds a {_kind(value)}, not text: {str(value)[:40]}")


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return {"dict": "struct", "tuple": "list", "bytes": "binary value"}.get(kind, kind)


def learned_flag(name: str, value: Any) -> bool:
    """Whether an answer is learned, from a cell such as `weight`; it is if the cell is empty.

    ValueError for a value that is neither yes nor no, such as 0.5.
    """
    if is_empty(value):
        return True
    words = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise ValueError(
            f"{name} {str(value)[:40]}: an answer is learned (1, true) or not (0, false), nothing "
            "between; change it, or rename it if it means something else"
        )
    return found

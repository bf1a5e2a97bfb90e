"""Cells of tables: as text, as a flag that makes an answer a training target, and as JSON."""

from __future__ import annotations

import json
from datetime import date, time
from decimal import Decimal
from typing import Any

from gptsmith.chat_template.message import is_empty, join_text_parts


class InvalidRowError(ValueError):
    """A row that is not a conversation. kind: what it is counted as. The text has no place."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def cell_text(value: Any, what: str, kind: str = "cell that is not text") -> str:
    """The text of a cell; numbers, dates and booleans are converted, empty cells become "".

    what: names the cell in errors. A list of text parts is joined. InvalidRowError for anything
    else, such as another list.
    """
    value = join_text_parts(value)
    if is_empty(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float | Decimal | date | time):
        return str(value)
    of = type(value).__name__
    of = {"dict": "struct", "tuple": "list", "bytes": "binary value"}.get(of, of)
    raise InvalidRowError(kind, f"{what} holds a {of}, not text: {str(value)[:40]}")


def target_flag(name: str, value: Any) -> bool:
    """Whether a cell such as `weight` makes an answer a training target; an empty one does.

    InvalidRowError for a value that is neither true nor false, such as 0.5.
    """
    if is_empty(value):
        return True
    text = str(value).strip().lower()
    if text in ("true", "yes", "false", "no"):
        return text in ("true", "yes")
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if number not in (0, 1):
        raise InvalidRowError(
            "unknown weight",
            f"{name} {str(value)[:40]}: an answer is trained on (1, true) or not (0, false), "
            "nothing between; change it, or rename it if it means something else",
        )
    return number == 1


def truth_value(value: Any) -> bool | None:
    """A truth value, also one written as text, as in a .csv; None for anything else."""
    text = str(value).strip().lower()
    return text == "true" if isinstance(value, bool | str) and text in ("true", "false") else None


def parse_json(value: Any, name: str) -> Any:
    """The value of a column, parsed as JSON if it is a text, as in a .csv; None if it is empty."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            problem = f"the column {name!r} holds {value[:40]!r}, which is not JSON"
            raise InvalidRowError("unreadable column", problem) from None
    return None if is_empty(value) else value

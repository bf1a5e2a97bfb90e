"""A row of a table, and the checks that all table readers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptsmith.data.columns import quoted


class Row(NamedTuple):
    """A row of a table. place: "file:line" or "file, row n". values: by column; None for null."""

    place: str
    values: dict[str, Any]


def check_unicode(row: Row, name: str, text: str) -> None:
    """ValueError naming place and column of a text that is not Unicode."""
    if problem := unicode_problem(text):
        raise ValueError(f"{row.place}: {name!r} is {problem}")


def unicode_problem(text: str) -> str:
    """A description of the first lone surrogate, which JSON can encode but UTF-8 cannot, or ""."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not Unicode at character {error.start}"
    return ""


def check_unique(names: Sequence[str], place: str) -> None:
    """ValueError for two columns with the same name. Columns without a name, such as an index that
    pandas wrote, are not read and may occur repeatedly."""
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(
                f"{place}: two columns are called {name!r}; rename one of {quoted(names)}"
            )

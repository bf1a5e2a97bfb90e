"""A check of one thing that gptsmith uses, and the report of all (`gptsmith doctor`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from rich.table import Table

from gptsmith.console import Console

State = Literal["ok", "missing", "problem"]


class Check(NamedTuple):
    """What was found of one thing.

    state: `missing` is something that gptsmith does without; a `problem` makes commands fail or
    wastes most of the machine. remedy: what can be done, or "".
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def attempt(
    name: str, check: Callable[..., Check | Iterable[Check]], *arguments: object
) -> Iterator[Check]:
    """The checks that a function returns; an exception is a problem of `name`, so that no check
    ends the report."""
    try:
        found = check(*arguments)
        yield from [found] if isinstance(found, Check) else found
    except Exception as error:
        yield Check(name, "problem", f"{type(error).__name__}: {first_line(error)}")


def show(found: Sequence[Check], console: Console) -> None:
    """Print a table and its summary."""
    table = Table("", "", "found", show_lines=False)
    for check in found:
        remedy = f"\n-> {check.remedy}" if check.remedy else ""
        table.add_row(check.name, check.state, f"{check.found}{remedy}")
    console.print(table)
    problems, missing = (
        sum(check.state == state for check in found) for state in ("problem", "missing")
    )
    console.print(f"problems: {problems}, missing and optional: {missing}")


def first_line(error: object) -> str:
    """The first line of a message, shortened."""
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]} ..."

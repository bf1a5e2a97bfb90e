"""What is checked for an exercise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Check = Callable[[Any], Iterator[str]]
"""Takes the module of a solution, and yields the name of each property before testing it: an error
is about the last one yielded."""


class Exercise(NamedTuple):
    """names: the classes and functions of the solution that the check uses."""

    title: str
    names: tuple[str, ...]
    check: Check

"""Checks solutions of the exercises: python -m course.check FILE [NUMBER ...]

Each exercise is checked in layers: shapes and types, then properties that a right solution has,
then equality with gptsmith's own component (outputs and gradients), in places with transformers
too. The first property that does not hold ends the exercise, and is named with the first index that
differs. FILE is run as Python code. Exit code: 0 if all exercises pass, 1 if not, 2 for a wrong
call.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from course.checks.compare import Mismatch
from course.checks.exercise import Exercise

PARTS = ("part1_model", "part1_data", "part2", "part3", "part4")
_MARKS = {"passed": "ok", "open": "--", "failed": "FAILED"}


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    passed    the properties that hold, in the order of the check
    property  the one that does not, or that was being checked when the code failed
    reason    why, with the first index that differs
    """

    number: str
    state: Literal["passed", "open", "failed"]
    passed: tuple[str, ...]
    property: str = ""
    reason: str = ""


def exercises() -> dict[str, Exercise]:
    """All exercises by number, in the order of the course."""
    found: dict[str, Exercise] = {}
    for part in PARTS:
        found |= importlib.import_module(f"course.checks.{part}").EXERCISES
    return found


def load(path: Path) -> ModuleType:
    """The module in a file, which is executed. ValueError if there is none, or it exits."""
    spec = importlib.util.spec_from_file_location(f"solution_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise ValueError(
            f"{path} ends the program when it is loaded: put what calls exit below "
            'if __name__ == "__main__":'
        ) from error
    return module


def check(number: str, exercise: Exercise, solution: ModuleType) -> Outcome:
    """Check one exercise of a solution; no error of its code passes."""
    torch.manual_seed(0)
    reached = ["the code runs"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not an error, whatever the caller's filters say
            for name in exercise.check(solution):
                reached.append(name)
    except NotImplementedError as error:
        return Outcome(number, "open", (), reason=str(error))
    except Mismatch as error:
        reason = str(error)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}{_place(error, solution)}"
    else:
        return Outcome(number, "passed", tuple(reached[1:]))
    return Outcome(number, "failed", tuple(reached[1:-1]), reached[-1], " ".join(reason.split()))


def _place(error: BaseException, solution: ModuleType) -> str:
    """The last line of the solution that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == solution.__file__]
    return f" (line {lines[-1]} of your file)" if lines else ""


def select(numbers: Sequence[str], solution: ModuleType) -> dict[str, Exercise]:
    """The exercises to check: those asked for, or all whose names the solution itself defines.

    ValueError for a number that does not exist, and for a solution without the names it needs.
    """
    known = exercises()
    for number in numbers:
        if number not in known:
            raise ValueError(f"there is no exercise {number}: they are {', '.join(known)}")
        for name in known[number].names:
            if not hasattr(solution, name):
                raise ValueError(
                    f"{solution.__file__} has no {name}, which exercise {number} needs"
                )
    own = {  # not those that it imports, such as gptsmith's GPTModel
        name
        for name, value in vars(solution).items()
        if getattr(value, "__module__", None) == solution.__name__
    }
    found = {
        number: exercise
        for number, exercise in known.items()
        if number in numbers or (not numbers and own.issuperset(exercise.names))
    }
    if not found:
        raise ValueError(f"{solution.__file__} has none of the classes and functions of the course")
    return found


def report(outcome: Outcome, exercise: Exercise) -> Iterator[str]:
    """Lines about an outcome."""
    line = f"{outcome.number:5} {exercise.title:34} {_MARKS[outcome.state]}"
    match outcome.state:
        case "passed":
            yield f"{line}  ({len(outcome.passed)} properties)"
        case "open":
            own = outcome.reason in ("", f"exercise {outcome.number}")
            yield f"{line}  {'not done yet' if own else f'needs {outcome.reason}'}"
        case "failed":
            yield line
            yield from (f"      holds: {name}" for name in outcome.passed)
            yield f"      FAILS: {outcome.property}"
            yield f"             {outcome.reason}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m course.check", description="Check solutions of the course's exercises."
    )
    parser.add_argument("file", type=Path, help="the Python file with your solutions; it is run")
    parser.add_argument("numbers", nargs="*", help="exercises, such as 1.4 (default: all in FILE)")
    options = parser.parse_args(argv)
    try:
        solution = load(options.file)
        chosen = select(options.numbers, solution)
    except (ValueError, SyntaxError) as error:
        parser.error(str(error))
    outcomes = []
    for number, exercise in chosen.items():
        outcomes.append(check(number, exercise, solution))
        print(*report(outcomes[-1], exercise), sep="\n", flush=True)
    passed = sum(outcome.state == "passed" for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} exercises pass")
    return 0 if passed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

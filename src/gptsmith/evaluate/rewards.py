"""Rewards of completions: what reinforcement learning increases.

A reward is a function of samples, which returns a number for each. Built in are comparisons with
the expected answer, which are those of `evaluate`; a Python function or an endpoint can be named
instead.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.data.prompts import Prompt
from gptsmith.evaluate.gsm8k import INVALID, last_number
from gptsmith.evaluate.options import JudgeOptions
from gptsmith.evaluate.skills import is_correct
from gptsmith.user_code import run_file

CODE = re.compile(r"(.+\.py):(\w+)")  # a reward that is Python code: file and function
FORMS = "exact, number, regex:PATTERN, length:TOKENS, judge, FILE.py:FUNCTION or URL#LABEL"
BATCHED = ("prompts", "completions", "rows")
_COMPARING = ("exact", "number", "judge")


class Sample(NamedTuple):
    """A completion. text: without the token that ends it; tokens: their number, with that one."""

    prompt: Prompt
    text: str
    tokens: int


Reward = Callable[[Sequence[Sample]], list[float]]


class RewardUnavailableError(ValueError):
    """The endpoint of a reward does not answer."""


def compares(name: str) -> bool:
    """Whether the reward of this name needs the expected answer of a prompt."""
    return name in _COMPARING


def code_digest(reward: Sequence[str]) -> str:
    """sha256 of the Python files that are named among the rewards; "" without any."""
    files = [Path(found[1]) for name in reward if (found := CODE.fullmatch(name))]
    texts = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(texts).hexdigest() if files else ""


def load_reward(
    name: str, *, trust_code: bool = False, judge: JudgeOptions | None = None, cache: Path
) -> Reward:
    """The reward of a name.

        exact              1 if the completion is the expected answer, except for white space at the
                           ends (as in `evaluate --tasks skills`), else 0
        number             1 if the last number of the completion is that of the expected answer (as
                           in `evaluate --tasks gsm8k`), else 0
        regex:PATTERN      1 if the pattern is found in the completion, else 0
        length:TOKENS      1 for at most so many tokens, falling to 0 at twice as many
        judge              the score of the judge, 0 to 1 (evaluate/judge.py)
        FILE.py:FUNCTION   what the function returns, only with trust_code; see `python_reward`
        URL#LABEL          the probability of the label that a classifier served at URL gives to the
                           completion (POST /v1/classify)

    cache: folder in which verdicts of the judge are kept, so that a resumed run gets the same ones.
    ValueError for an unknown name, code that cannot be used, and a judge that is not configured;
    RewardUnavailableError for a server that does not answer.
    """
    # here: it needs httpx, and most runs do not need it
    from gptsmith.evaluate.reward_endpoints import classifier_reward, judge_reward

    kind, colon, argument = name.partition(":")
    if found := CODE.fullmatch(name):
        return python_reward(Path(found[1]), found[2], trust_code)
    if kind in ("http", "https"):
        return classifier_reward(name, judge or JudgeOptions())
    match kind, bool(colon):
        case "exact", False:
            return lambda samples: [float(is_correct(s.text, answer_of(s))) for s in samples]
        case "number", False:
            return lambda samples: [float(same_number(s.text, answer_of(s))) for s in samples]
        case "regex", True:
            return _regex(argument)
        case "length", True:
            return _length(argument)
        case "judge", False:
            return judge_reward(judge or JudgeOptions(), cache)
    raise ValueError(f"no reward {name!r}: choose from {FORMS}")


# --- built in ------------------------------------------------------------------------------------


def answer_of(sample: Sample) -> str:
    """The expected answer; ValueError naming a row without one."""
    if sample.prompt.answer is None:
        raise ValueError(
            f"{sample.prompt.place}: no expected answer to compare with; --answer-column NAME says "
            "which column it is in"
        )
    return sample.prompt.answer


def same_number(response: str, answer: str) -> bool:
    """Whether the last numbers of two texts are equal; False without numbers."""
    one, two = last_number(response), last_number(answer)
    if INVALID in (one, two):
        return False
    try:
        return float(one) == float(two)
    except ValueError:  # 1.2.3
        return one == two


def _regex(pattern: str) -> Reward:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"reward regex:{pattern}: {error}") from None
    if not pattern:
        raise ValueError("reward regex: is found in every completion: give a pattern after it")
    return lambda samples: [float(compiled.search(s.text) is not None) for s in samples]


def _length(argument: str) -> Reward:
    if not re.fullmatch(r"[1-9]\d{0,8}", argument):
        raise ValueError(f"reward length:{argument}: give a number of tokens, as in length:100")
    limit = int(argument)
    return lambda samples: [min(1.0, max(0.0, 2 - s.tokens / limit)) for s in samples]


# --- Python --------------------------------------------------------------------------------------


def python_reward(path: Path, name: str, trust_code: bool) -> Reward:
    """A function in a file: of (prompt, completion, row), which returns a number, or of lists
    (prompts, completions, rows), which returns a list of them.

        def brevity(prompt: str, completion: str, row: dict) -> float:
            return 1.0 if len(completion) <= 2 * len(row["answer"]) else 0.0

    prompt: the text of the last message. row: all columns of the prompt's row. ValueError without
    trust_code, for a file or function that cannot be used, and, when it is called, for what it
    raises and for values that are not finite numbers.
    """
    where = f"reward {path}:{name}"
    module = run_file(path, where, trust_code=trust_code)
    function = getattr(module, name, None)
    parameters = tuple(inspect.signature(function).parameters) if callable(function) else ()
    if not callable(function) or len(parameters) != 3:
        raise ValueError(f"{where}: the file has no function {name}(prompt, completion, row)")

    def one_by_one(samples: Sequence[Sample]) -> list[float]:
        return [call(s.prompt.place, s.prompt.question, s.text, {**s.prompt.row}) for s in samples]

    def together(samples: Sequence[Sample]) -> list[float]:
        columns = zip(
            *((s.prompt.question, s.text, {**s.prompt.row}) for s in samples), strict=True
        )
        values = call("all samples", *map(list, columns)) if samples else []
        if hasattr(values, "tolist"):  # arrays of NumPy and torch
            values = values.tolist()
        if not isinstance(values, list | tuple) or len(values) != len(samples):
            raise ValueError(f"{where}: returns no list of {len(samples)} numbers")
        return [finite(value, s.prompt.place) for value, s in zip(values, samples, strict=True)]

    def call(place: str, *arguments: Any) -> Any:
        try:
            value = function(*arguments)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{where}: raises {error!r} for {place}") from error
        return value if parameters == BATCHED else finite(value, place)

    def finite(value: Any, place: str) -> float:
        number = value
        with suppress(AttributeError, ValueError, RuntimeError):  # no array, or one of several
            number = value.item()  # of NumPy or torch
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{where}: returns {value!r} for {place}, not a finite number")
        return float(number)

    return together if parameters == BATCHED else one_by_one

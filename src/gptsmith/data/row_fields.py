"""Fields of a row besides its messages: context, history, system message, tools, target flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.chat_template.message import is_empty
from gptsmith.data import columns as names
from gptsmith.data.cells import InvalidRowError, cell_text, parse_json, target_flag, truth_value
from gptsmith.data.columns import is_irrelevant, quoted
from gptsmith.data.messages import cell_message
from gptsmith.data.report import ReadReport


def cell(values: Mapping[str, Any], name: str) -> str:
    return cell_text(values[name], f"the column {name!r}")


def texts(values: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, str]:
    """The non-blank texts of the given columns, by column."""
    found = {name: cell(values, name) for name in columns if name in values}
    return {name: text for name, text in found.items() if text.strip()}


def context(values: Mapping[str, Any], without: set[str]) -> dict[str, str]:
    """The texts of the columns that give context to a question (Alpaca's `input`)."""
    return texts(values, tuple(name for name in names.CONTEXT if name not in without))


def history(values: Mapping[str, Any]) -> list[Any]:
    """The earlier messages of a row, pairs of question and answer (Alpaca) or messages."""
    turns: list[Any] = []
    for name in names.HISTORY:
        pairs = parse_json(values.get(name), name) or []
        for pair in pairs if isinstance(pairs, list) else [pairs]:
            if isinstance(pair, Mapping):
                turns.append(pair)
            elif isinstance(pair, list) and len(pair) == 2:
                asked, answered = (cell_text(text, f"the column {name!r}") for text in pair)
                if not asked.strip():
                    raise InvalidRowError("no question", f"no text in a question of {name!r}")
                turns += [cell_message("user", asked), cell_message("assistant", answered)]
            else:
                problem = f"the column {name!r} holds {str(pair)[:40]}, not [question, answer]"
                raise InvalidRowError("unreadable history", problem)
    return turns


def system_text(values: Mapping[str, Any]) -> str:
    """The system message of a row, "" if it has none. InvalidRowError for two different ones."""
    plain = {k: v.get("parts", v) if isinstance(v, Mapping) else v for k, v in values.items()}
    found = texts(plain, names.SYSTEM)
    if len(set(found.values())) > 1:
        raise InvalidRowError("two system messages", f"{quoted(found)} differ")
    return next(iter(found.values()), "")


def tools_of(values: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row: a list of objects, or its JSON; None if there are none."""
    for name in names.TOOLS:
        if tools := parse_json(values.get(name), name):
            tools = [tools] if isinstance(tools, Mapping) else tools
            if isinstance(tools, list):
                tools = [parse_json(tool, name) for tool in tools]
            if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
                problem = f"the column {name!r} holds {str(tools)[:40]}, not a list of tools"
                raise InvalidRowError("unreadable tools", problem)
            return tools
    return None


def target_answers(
    values: Mapping[str, Any], flags: list[bool | None], answers: list[int]
) -> frozenset[int]:
    """The answers that are targets by the flags of messages and row. InvalidRowError for invalid
    flags.

    flags: of each message. answers: indices of the assistant's messages.
    """
    targets = {i for i in answers if flags[i] is not False}
    for name in names.TARGET_FLAGS:
        value = values.get(name)
        if isinstance(value, list) and value:
            if len(value) != len(flags):
                problem = f"{name} has {len(value)} values for {len(flags)} messages"
                raise InvalidRowError("unknown weight", problem)
            targets &= {i for i in answers if target_flag(name, value[i])}
        elif not target_flag(name, value):
            targets.clear()
    if any(truth_value(values.get(name)) is False for name in names.PREFERENCE_FLAGS):
        targets.clear()
    return frozenset(targets)


def check_no_media(values: Mapping[str, Any]) -> None:
    """InvalidRowError for a row with images, audio or video, which a text model cannot read."""
    for name in names.MEDIA:
        if not is_empty(values.get(name)):
            raise InvalidRowError("row with media", f"it has {name}, which the model cannot read")


def report_unused_columns(values: Mapping[str, Any], used: set[str], report: ReadReport) -> None:
    """Report non-empty columns that are neither used nor known to be irrelevant."""
    used = used.union(names.SYSTEM, names.TARGET_FLAGS, names.TOOLS)
    for name, value in values.items():
        if name in used or is_empty(value) or is_irrelevant(name):
            continue
        usual = name.strip().lower()
        if name in names.PREFERENCE_FLAGS and truth_value(value) is not None:
            report.hint(f"answers of which column {name!r} is false are not trained on")
        elif usual in names.REASONING:
            report.hint(
                f"column {name!r} is not used: answers are trained on without this reasoning, "
                "unless you write it into them"
            )
        else:
            report.hint(f"column {name!r} is not used")

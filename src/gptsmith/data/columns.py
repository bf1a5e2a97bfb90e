"""Usual names of columns in data sets, and choosing a column by its name.

To recognise another name, add it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The first name of a tuple wins over the others. If it is absent, only one other may be present.
TEXT = (
    "text", "content", "document", "article", "story", "body", "sentence", "review", "message",
    "sms", "v2",
)  # fmt: skip
LABEL = ("label", "class", "target", "sentiment", "category", "v1")

# Conversations: the messages of a row (OpenAI, ShareGPT, Taskmaster), and in each message the
# speaker and the text.
MESSAGES = ("messages", "conversations", "conversation", "utterances")
ROLE = ("role", "from", "speaker")
CONTENT = ("content", "value", "text")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# A question and its answer; a row of either form may have a system message too.
PROMPT_AND_RESPONSE = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
SYSTEM = ("system", "system_prompt")


def usual_columns(names: Iterable[str], usual: Sequence[str]) -> list[str]:
    """Those of `names` that are in `usual`; only the first of `usual`, if it is present.

    Case and surrounding white space do not matter, but an exact match of the first name wins.
    """
    names = list(names)
    if usual[0] in names:
        return [usual[0]]
    matches = [name for name in names if name.strip().lower() in usual]
    return [name for name in matches if name.strip().lower() == usual[0]] or matches


def choose_column(
    names: Sequence[str], configured: str | None, usual: Sequence[str], place: str
) -> str | None:
    """The configured column (ValueError if it is missing), or the only one with a usual name."""
    if configured is not None:
        if configured not in names:
            raise ValueError(f"{place}: no column {configured!r}, only {quoted(names)}")
        return configured
    matches = usual_columns(names, usual)
    return matches[0] if len(matches) == 1 else None


def unclear_column(what: str, names: Sequence[str], place: str) -> ValueError:
    """The error for a column that is neither configured nor obvious."""
    shown = quoted(name[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return ValueError(
        f"{place}: which column holds the {what}? Choose from {shown} with --{what}-column NAME"
    )


def quoted(names: Iterable[str]) -> str:
    """Column names for a message."""
    return ", ".join(repr(name) for name in names)

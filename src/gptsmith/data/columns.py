"""Names under which data sets keep the columns that we read, and how a column is chosen.

Another name is one more word in these tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Of each tuple the first name wins over the others, of which there must be only one.
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


def known_columns(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Those of `names` that `known` has, whatever their case; only the first of `known`, if there.

    A name spelt exactly so wins over one that differs in case or in white space around it.
    """
    names = list(names)
    if known[0] in names:
        return [known[0]]
    found = [name for name in names if name.strip().lower() in known]
    return [name for name in found if name.strip().lower() == known[0]] or found


def choose_column(
    names: Sequence[str], asked: str | None, known: Sequence[str], place: str
) -> str | None:
    """The column asked for (ValueError if it is missing), or the only one with a known name."""
    if asked is not None:
        if asked not in names:
            raise ValueError(f"{place}: no column {asked!r}; there are {listed(names)}")
        return asked
    found = known_columns(names, known)
    return found[0] if len(found) == 1 else None


def unclear_column(what: str, names: Sequence[str], place: str) -> ValueError:
    """The error for a column that is neither asked for nor obvious."""
    shown = listed(name[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return ValueError(
        f"{place}: which column holds the {what}? There are {shown}; say --{what}-column NAME"
    )


def listed(names: Iterable[str]) -> str:
    """Column names for a message."""
    return ", ".join(repr(name) for name in names)

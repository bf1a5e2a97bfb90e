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

# Conversations: the messages of a row (OpenAI, ShareGPT, Taskmaster, Gemini), and in each message
# the speaker and the text.
MESSAGES = (
    "messages", "conversations", "conversation", "utterances", "dialogue", "dialog", "turns",
    "contents",
)  # fmt: skip
ROLE = ("role", "from", "speaker", "author", "sender")
CONTENT = ("content", "value", "text", "parts")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_call": "call",  # an assistant's message whose text is the call
    "tool_call": "call",
}
# A question and its answer, and what a row of this form may have beside them: what the question is
# about, earlier questions and answers.
PROMPT_AND_RESPONSE = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
CONTEXT = ("input", "context", "passage", "document", "background", "knowledge")
HISTORY = ("history",)
# A row of either form may have a system message and tools.
SYSTEM = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
TOOLS = ("tools", "functions")
# Whether an answer, or all of a row, is learned: 1 or 0, true or false. In a message only, `loss`
# is one of them: that of a row is a measurement.
LEARNED = (
    "weight", "weights", "train", "training", "trainable", "is_trainable", "learn", "loss_mask",
    "loss_weight", "loss_scale",
)  # fmt: skip
LEARNED_MESSAGE = (*LEARNED, "loss")
MASKED_MESSAGE = ("masked", "ignore", "ignored")  # the contrary
# Fields that say it in a way that cannot be followed: which of its values means what, or which part
# of a message is learned.
UNCLEAR_MESSAGE = ("mask", "train_detail", "training_detail")
# What a text model cannot read.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Known not to matter; other columns that are not used are reported.
IRRELEVANT = (
    "id", "idx", "index", "uuid", "hash", "timestamp", "created_at", "source", "dataset", "lang",
    "language", "split", "url", "license", "tags", "meta", "metadata", "parallel_tool_calls",
)  # fmt: skip


def is_irrelevant(name: str) -> bool:
    """Whether a column is known not to matter for what is learned."""
    name = name.strip().lower()
    return not name or name in IRRELEVANT or name.startswith("__") or name.endswith("_id")


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

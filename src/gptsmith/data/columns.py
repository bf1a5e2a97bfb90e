"""Common names of columns in data sets, and choosing a column by its name.

To recognise another name, add it here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gptsmith.chat_template.message import REASONING as MESSAGE_REASONING

# The first name of a tuple takes precedence. Without it, exactly one of the others must be present.
TEXT = (
    "text", "content", "document", "article", "story", "body", "sentence", "review", "message",
    "sms", "v2",
)  # fmt: skip
TOKEN_IDS = "input_ids"
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
# Names of a question and its answer; such rows may also have context for the question, and earlier
# questions and answers.
PROMPT_AND_RESPONSE = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("human", "assistant"),
    ("user", "assistant"),
)
# Preferences: the better and the worse answer, their scores, and the question, unless the answers
# are whole conversations.
CHOSEN_AND_REJECTED = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),  # OpenAI
    ("chosen_response", "rejected_response"),
)
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
PROMPTS = (
    "prompt", "question", "instruction", "query", "problem", "inputs", "human", "user", "input",
)  # fmt: skip
CONTEXT = ("input", "context", "passage", "document", "background", "knowledge")
HISTORY = ("history",)
# Rows of both kinds may have a system message and tools.
SYSTEM = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
TOOLS = ("tools", "functions")
# Flags that say whether an answer, or every answer of a row, is a target: 1 or 0, true or false.
# `loss` is one in messages only: in a row it is a measurement.
TARGET_FLAGS = (
    "weight", "weights", "train", "training", "do_train", "trainable", "is_trainable", "learn",
    "loss_mask", "loss_weight", "loss_scale",
)  # fmt: skip
MESSAGE_TARGET_FLAGS = (*TARGET_FLAGS, "loss")
MESSAGE_MASK_FLAGS = (
    "masked",
    "ignore",
    "ignored",
    "exclude",
    "excluded",
    "skip",
    "no_loss",
)  # the opposite
# Ambiguous flags: it is unknown what their values mean, or which part of a message is a target.
MESSAGE_UNCLEAR_FLAGS = ("mask", "train_detail", "training_detail")
# Flags by which rows of preferences (KTO) say whether their answer is a good one, if the value is a
# truth value: another `label` may be anything.
PREFERENCE_FLAGS = ("label", "kto_tag", "desirable", "thumbs_up")
# What led to an answer. (Such fields of a message are passed to the template.)
REASONING = (
    *MESSAGE_REASONING, "cot", "complex_cot", "chain_of_thought", "rationale", "rationales",
    "explanation", "scratchpad",
)  # fmt: skip
# What a text model cannot read.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Columns without influence on training; other unused columns are reported.
IRRELEVANT = (
    "id", "idx", "index", "uuid", "hash", "timestamp", "created_at", "source", "dataset", "lang",
    "language", "split", "url", "license", "tags", "meta", "metadata", "parallel_tool_calls",
)  # fmt: skip


def is_irrelevant(name: str) -> bool:
    """Whether a column is known to have no influence on training."""
    name = name.strip().lower()
    return not name or name in IRRELEVANT or name.startswith("__") or name.endswith("_id")


def with_known_names(
    values: Mapping[str, Any], known: Collection[str], unchanged: Collection[str | None] = ()
) -> dict[str, Any]:
    """The values with columns such as `Question ` under their known names, where these are free."""
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        plain = name.strip().lower()
        is_other = name in unchanged or plain not in known or plain in values or plain in renamed
        renamed[name if is_other else plain] = value
    return renamed


def known_columns(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """The `names` that occur in `known`, or only the first of `known` if it is present.

    Case and surrounding white space are ignored, but an exact match of the first name wins.
    """
    names = list(names)
    if known[0] in names:
        return [known[0]]
    matches = [name for name in names if name.strip().lower() in known]
    return [name for name in matches if name.strip().lower() == known[0]] or matches


def choose_column(
    names: Sequence[str], configured: str | None, known: Sequence[str], place: str
) -> str | None:
    """The configured column (ValueError if it is missing), or the only one with a common name."""
    if configured is not None:
        if configured not in names:
            raise ValueError(f"{place}: no column {configured!r}, only {quoted(names)}")
        return configured
    matches = known_columns(names, known)
    return matches[0] if len(matches) == 1 else None


def has_text(names: Iterable[str]) -> bool:
    """Whether a column is called text, which next to token ids may be what they were made from."""
    return any(name.strip().lower() == TEXT[0] for name in names)


def choose_text_column(
    names: Sequence[str], configured: str | None, candidates: Sequence[str], place: str
) -> str:
    """The column of texts: as configured, or with a common name, or the only candidate.

    ValueError, beginning with `place`, if there is none.
    """
    column = choose_column(names, configured, TEXT, place)
    if column is None and len(candidates) == 1:
        return candidates[0]
    if column is None:
        raise unclear_column("text", names, place)
    return column


def unclear_column(what: str, names: Sequence[str], place: str) -> ValueError:
    """The error for a column that is neither configured nor obvious."""
    if not names:
        return ValueError(f"{place}: has no columns")
    shown = quoted(name[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return ValueError(
        f"{place}: which column holds the {what}? Choose from {shown} with --{what}-column NAME"
    )


def quoted(names: Iterable[str]) -> str:
    """Column names, quoted and joined for a message."""
    return ", ".join(repr(name) for name in names)

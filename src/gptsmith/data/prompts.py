"""Prompts for reinforcement learning: questions, and the answers that rewards compare with.

A row has a question (`prompt`, `question` ..., a text or messages) or a conversation (`messages`
...), and an answer in a column of its own or as the last message. Rewards that compare with nothing
need no answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.chat_template.message import Message, is_empty
from gptsmith.data import columns as names
from gptsmith.data import row_fields, skills
from gptsmith.data.cells import InvalidRowError
from gptsmith.data.conversations import messages_in_text, question_turns, with_system
from gptsmith.data.messages import is_message, read_message, transcript
from gptsmith.data.options import PromptFiles
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row, check_unicode
from gptsmith.data.rows import read_rows
from gptsmith.data.split import group_prompts, split_by_hash
from gptsmith.terminal import counted

QUESTION = tuple(dict.fromkeys(question for question, _ in names.PROMPT_AND_RESPONSE))
ANSWER = (
    "answer", *sorted({answer for _, answer in names.PROMPT_AND_RESPONSE} - {"answer"}),
    "ground_truth", "reference", "reference_answer", "expected", "target", "final_answer",
)  # fmt: skip
_KNOWN = {
    *QUESTION, *ANSWER, *names.MESSAGES, *names.CONTEXT, *names.HISTORY, *names.SYSTEM,
    *names.TOOLS, *names.MEDIA,
}  # fmt: skip


class Prompt(NamedTuple):
    """Messages that end with the user's, the expected answer (None if the row has none), all
    columns of the row, its place, and the tools that the assistant may call."""

    messages: list[Message]
    answer: str | None
    row: Mapping[str, Any]
    place: str
    tools: list[Any] | None = None

    @property
    def question(self) -> str:
        """The text of the last message."""
        return self.messages[-1]["content"]

    @property
    def text(self) -> str:
        """All messages, for people."""
        return "\n".join(message["content"] for message in self.messages)


def read_prompts(
    sources: Sequence[str | Path],
    files: PromptFiles,
    report: ReadReport,
    needs_answer: bool = False,
) -> Iterator[Prompt]:
    """The prompts of files, folders and patterns (data/rows.py), in order.

    needs_answer: whether a row without an expected answer is unusable. ValueError naming the place
    of a row that is not a prompt, unless `report` skips it.
    """
    configured = (files.prompt_column, files.answer_column)
    for source in sources:
        for row in read_rows(source, report, file_format=files):
            named = row._replace(values=names.with_known_names(row.values, _KNOWN, configured))
            try:
                prompt = _prompt(named, files, row.values)
                if needs_answer and prompt.answer is None:
                    problem = "no expected answer to compare with; --answer-column NAME says which "
                    raise InvalidRowError("row without an answer", problem + "column it is in")
                yield prompt
            except InvalidRowError as error:
                report.reject(error.kind, row.place, str(error))


def skill_prompts(seed: int, count: int) -> list[Prompt]:
    """Questions of the built-in chat set with arguments and phrasings of training."""
    return [_of_skill(item, i) for i, item in enumerate(skills.practice(seed, count))]


def held_out_skill_prompts(seed: int, per_skill: int) -> list[Prompt]:
    """Questions of the built-in chat set with held-out arguments."""
    return [_of_skill(item, i) for i, item in enumerate(skills.held_out(seed, per_skill))]


def _of_skill(item: skills.Item, number: int) -> Prompt:
    return Prompt(item.messages, item.answer, {"skill": item.skill}, f"skills {number}")


def split_prompts(
    prompts: Sequence[Prompt], fraction: float, seed: int, at_most: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and for validation, by a hash of their texts, so that equal ones stay
    together. at_most: different ones for validation. ValueError if a part would be empty."""
    groups = group_prompts(prompt.text for prompt in prompts)
    n_val = min(at_most, round(fraction * len(groups)))
    if not 0 < n_val < len(groups):
        raise ValueError(
            f"{counted(len(groups), 'different prompt')} cannot give {n_val} for validation: use "
            f"more, another val_fraction than {fraction}, or --val FILE"
        )
    val, train = ([prompts[i] for i in part] for part in split_by_hash(groups, (n_val,), seed))
    return train, val


class EncodedPrompt(NamedTuple):
    """A prompt and its token ids."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(
    prompts: Iterable[Prompt],
    encode: Callable[[Sequence[Message], Sequence[Any] | None], list[int]],
    limit: int,
    report: ReadReport,
) -> list[EncodedPrompt]:
    """Prompts of at most `limit` tokens; longer ones are skipped and counted.

    encode: messages, tools -> the ids before the answer. ValueError, naming the place, for a prompt
    that it rejects, unless `report` skips it.
    """
    found = []
    for prompt in prompts:
        try:
            ids = encode(prompt.messages, prompt.tools)
        except ValueError as error:
            report.reject("prompt that cannot be encoded", prompt.place, str(error))
            continue
        if len(ids) > limit:
            report.skipped.add(f"longer than {limit} tokens", prompt.place)
            continue
        found.append(EncodedPrompt(prompt, ids))
    return found


def fingerprint(prompts: Iterable[EncodedPrompt]) -> str:
    """sha256 over ids, answers and rows, in order."""
    digest = hashlib.sha256()
    for prompt, ids in prompts:
        digest.update(json.dumps([ids, prompt.answer, prompt.row], default=str).encode())
    return digest.hexdigest()


# --- rows ----------------------------------------------------------------------------------------


def _prompt(row: Row, files: PromptFiles, original: Mapping[str, Any]) -> Prompt:
    values = row.values
    row_fields.check_no_media(values)
    turns, used = _turns(row, files)
    if system := row_fields.system_text(values):
        turns = with_system(turns, system, files)
    column = _column(row, files.answer_column, ANSWER, used, "answer")
    given = None if column is None else values[column]
    if isinstance(given, list) and all(is_message(turn, files) for turn in given):
        turns, given = [*turns, *given], None
    messages = [read_message(turn, files).message for turn in turns]
    answer = None if column is None or is_empty(given) else row_fields.cell(values, column)
    if messages and messages[-1]["role"] == "assistant":
        last = messages.pop()
        answer = last["content"] if answer is None else answer
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InvalidRowError("row without a question", "no message of the user to answer")
    for name, text in (("answer", answer or ""), *((m["role"], m["content"]) for m in messages)):
        check_unicode(row, name, text)
    return Prompt(messages, answer, original, row.place, row_fields.tools_of(values))


def _turns(row: Row, files: PromptFiles) -> tuple[list[Any], set[str]]:
    """The messages of a row, unchecked, and the columns they are from."""
    values = row.values
    named = [name for name in names.MESSAGES if not is_empty(values.get(name))]
    if files.prompt_column is None and named:
        turns = messages_in_text(values[named[0]], named[0])
        turns = transcript(turns) or turns
        return turns if isinstance(turns, list) else [turns], {named[0]}
    column = _column(row, files.prompt_column, QUESTION, set(), "prompt")
    if column is None:
        raise names.unclear_column("prompt", list(values), row.place)
    values = {**values, column: messages_in_text(values[column], column)}
    return question_turns(values, column, {files.answer_column or ""})


def _column(
    row: Row, configured: str | None, known: Sequence[str], used: set[str], what: str
) -> str | None:
    """The configured column, or the only one with a common name; the first of the names wins."""
    if configured is not None:
        return names.choose_column(list(row.values), configured, known, row.place)
    free = [name for name in row.values if name not in used]
    found = names.known_columns(free, known)
    if len(found) > 1:
        raise ValueError(
            f"{row.place}: which column holds the {what}, {' or '.join(map(repr, found))}? "
            f"Choose with --{what}-column NAME"
        )
    return found[0] if found else None

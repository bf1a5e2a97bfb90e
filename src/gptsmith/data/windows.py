"""Conversations that are longer than a row, divided into windows of whole turns.

A turn is a message of the user, or several in a row, and what follows; a greeting before the first
is a turn too. The system message is repeated in every window. Each answer is learned once, in a
window that begins with its turn or an earlier one; an answer that does not fit even so is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.message import turn_starts
from gptsmith.chat_template.template import ChatTemplate, ThoughtsLeftOutError, TurnTokens
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Example, answer_ends


class Window(NamedTuple):
    """What follows the last answer is removed, as nothing in it is learned. turn: its first one."""

    example: Example
    answers: int
    turn: int


def conversation_windows(
    conversation: Conversation, template: ChatTemplate, limit: int
) -> Iterator[Window]:
    """The windows of a conversation, of at most `limit` tokens. ValueError from the template."""
    messages, place, learned, tools = conversation
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    pending = [i for i in answers if learned is None or i in learned]
    starts = turn_starts(messages)
    before, turn = messages[: starts[0]], 0
    stop = len(messages)
    while pending:
        skipped = starts[turn] - starts[0]
        near = [i for i in pending if i < stop][: limit + 1]  # more cannot fit: each takes a token
        if len(near) > limit:
            stop = near[-1] + 1
        targets = {i - skipped for i in near}
        part = [*before, *messages[starts[turn] : stop]]
        try:
            encoded = template.encode(part, learned=targets, tools=tools)
        except ThoughtsLeftOutError as error:  # the template writes them in the last turn only
            if error.message + skipped + 1 == stop:
                raise
            stop = error.message + skipped + 1
            continue
        ids = np.array(encoded.ids, np.int32)
        labels = np.where(encoded.is_target, ids, np.int32(IGNORE_INDEX))
        ends = np.array(encoded.ends)
        count = int((ends <= limit).sum())
        if count:
            end = ends[count - 1]
            yield Window(Example(ids[:end], labels[:end], place), count, turn)
        elif turn < _turn_of(pending[0], starts):  # turns before it, in which nothing is learned
            turn += 1
            continue
        pending = pending[max(1, count) :]
        # What follows thoughts that had to be in the last turn may have the same turns before it.
        if pending and not (count == len(near) and pending[0] >= stop):
            turn = _turn_of(pending[0], starts)
        stop = len(messages)


def _turn_of(position: int, starts: Sequence[int] | np.ndarray) -> int:
    """The last turn that starts at or before a position."""
    return int(np.searchsorted(starts, position, side="right")) - 1


def token_windows(example: Example, tokens: TurnTokens, limit: int) -> Iterator[Window]:
    """The same for a conversation of which only token ids and labels are known. Where the ids do
    not tell where the user's messages begin, a turn begins after each answer."""
    ids, labels, place = example
    ends = answer_ends(example, tokens)
    if not len(ends):
        return
    if ends[-1] <= limit:
        yield Window(Example(ids[: ends[-1]], labels[: ends[-1]], place), len(ends), 0)
        return
    befores = np.array([0, *ends[:-1]])
    starts, answers = _occurrences(ids, tokens.user), _occurrences(ids, tokens.answer)
    if len(starts) and len(answers):  # of several messages of the user in a row, the first one
        _, firsts_in_row = np.unique(np.searchsorted(answers, starts), return_index=True)
        greeting = answers[:1][answers[:1] < starts[0]]
        starts = np.concatenate([greeting, starts[firsts_in_row]])
    if not len(starts) or starts[0] >= ends[0]:
        n = len(tokens.opening)
        starts = np.array([n if ids[:n].tolist() == tokens.opening else 0, *ends[:-1]])
    before = int(starts[0])
    is_target = labels != IGNORE_INDEX
    firsts = [int(np.argmax(is_target[a:b])) + a for a, b in zip(befores, ends, strict=True)]
    done, turn = 0, 0
    while done < len(ends):
        start = int(starts[turn])
        count = int((ends[done:] - start + before <= limit).sum())
        if count:
            end = ends[done + count - 1]
            new = labels[start:end].copy()
            new[: max(0, befores[done] - start)] = IGNORE_INDEX  # learned in another window
            head = np.full(before, IGNORE_INDEX, labels.dtype)
            joined = np.concatenate([ids[:before], ids[start:end]]), np.concatenate([head, new])
            yield Window(Example(*joined, place), count, turn)
        elif turn < _turn_of(firsts[done], starts):
            turn += 1
            continue
        done += max(1, count)
        turn = _turn_of(firsts[done], starts) if done < len(ends) else turn


def _occurrences(ids: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """Where the pattern begins in the ids."""
    n = len(pattern)
    if not n or len(ids) < n:
        return np.empty(0, np.int64)
    views = np.lib.stride_tricks.sliding_window_view(ids, n)
    return np.flatnonzero((views == np.array(pattern)).all(axis=1))

"""Conversations that are longer than a row, divided into windows of whole turns.

A turn is a message of the user, or several in a row, and what follows; a greeting before the first
is a turn too. The system message is repeated in every window. Each answer is learned once, in a
window that begins with its turn or an earlier one; an answer that does not fit even so is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.message import turn_starts
from gptsmith.chat_template.template import ChatTemplate, ReasoningOmittedError, TurnTokens
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Example, answer_ends


class Window(NamedTuple):
    """What follows the last answer is removed, as nothing in it is learned. turn: its first one."""

    example: Example
    answers: int
    turn: int


Indices = Sequence[int] | np.ndarray
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, labels, where each answer to learn ends


def _windows(
    part: Callable[[int, int], _Part], turns: Sequence[int], place: str, limit: int
) -> Iterator[Window]:
    """turns: of the answers to learn. part(turn, i): from this turn on, with answer i and those
    after it as targets; fewer than all, if a window must end before the next one."""
    done, turn = 0, 0
    while done < len(turns):
        ids, labels, ends = part(turn, done)
        count = int((ends <= limit).sum())
        if count:
            end = ends[count - 1]
            yield Window(Example(ids[:end], labels[:end], place), count, turn)
        elif turn < turns[done]:  # turns before it, in which nothing is learned
            turn += 1
            continue
        done += max(1, count)
        if done < len(turns) and count < len(ends):
            turn = turns[done]


def conversation_windows(
    conversation: Conversation, template: ChatTemplate, limit: int
) -> Iterator[Window]:
    """The windows of a conversation, of at most `limit` tokens. ValueError from the template."""
    messages, place, learned, tools = conversation
    answers = [i for i in conversation.answers if learned is None or i in learned]
    starts = turn_starts(messages)

    def part(turn: int, first: int) -> _Part:
        """Rendered anew: a template may write its first or last turn in another way."""
        skipped, stop = starts[turn] - starts[0], len(messages)
        while True:
            near = [i for i in answers[first : first + limit + 1] if i < stop]
            if len(near) > limit:  # more cannot fit: each takes a token
                stop = near[-1] + 1
            said = [*messages[: starts[0]], *messages[starts[turn] : stop]]
            try:
                found = template.encode(said, targets={i - skipped for i in near}, tools=tools)
            except ReasoningOmittedError as error:  # it writes them in the last turn only
                if error.message + skipped + 1 == stop:
                    raise
                stop = error.message + skipped + 1
                continue
            ids = np.array(found.ids, np.int32)
            labels = np.where(found.is_target, ids, np.int32(IGNORE_INDEX))
            return ids, labels, np.array(found.ends)

    yield from _windows(part, _turns_of(answers, starts), place, limit)


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
    targets = np.flatnonzero(labels != IGNORE_INDEX)
    firsts = targets[np.searchsorted(targets, befores)]

    def part(turn: int, first: int) -> _Part:
        here = slice(int(starts[turn]), int(starts[turn]) + limit - before)
        new = labels[here].copy()
        new[: max(0, befores[first] - here.start)] = IGNORE_INDEX  # learned in another window
        head = np.full(before, IGNORE_INDEX, labels.dtype)
        joined = np.concatenate([ids[:before], ids[here]])
        return joined, np.concatenate([head, new]), ends[first:] - here.start + before

    yield from _windows(part, _turns_of(firsts, starts), place, limit)


def _turns_of(positions: Indices, starts: Indices) -> list[int]:
    """The last turn that starts at or before each position."""
    return (np.searchsorted(starts, positions, side="right") - 1).tolist()


def _occurrences(ids: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """Where the pattern begins in the ids."""
    n = len(pattern)
    if not n or len(ids) < n:
        return np.empty(0, np.int64)
    views = np.lib.stride_tricks.sliding_window_view(ids, n)
    return np.flatnonzero((views == np.array(pattern)).all(axis=1))

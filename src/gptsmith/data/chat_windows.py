"""Divide conversations that are longer than a row into windows of whole turns.

A turn is one or more consecutive user messages and what follows; a greeting before the first one is
a turn too. The system message is repeated in every window. Each answer is a target once, in a
window that begins with its turn or an earlier one. An answer that does not fit into a window of its
own turn is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.message import turn_starts
from gptsmith.chat_template.template import ChatTemplate, ReasoningOmittedError, TurnTokens
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Example, answer_ends, ids_and_labels


class Window(NamedTuple):
    """A part of a conversation, up to the end of its last target.

    answers: the number of answers that are targets. turn: the index of its first turn.
    """

    example: Example
    answers: int
    turn: int


Indices = Sequence[int] | np.ndarray
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, labels, ends of the target answers


def _windows(
    part: Callable[[int, int], _Part], turns: Sequence[int], place: str, limit: int
) -> Iterator[Window]:
    """The windows of a conversation.

    turns: the turn of each target answer. part(turn, i): the conversation from this turn on, with
    answer i and the following ones as targets; it may contain fewer than all of them.
    """
    done, turn = 0, 0
    while done < len(turns):
        ids, labels, ends = part(turn, done)
        count = int((ends <= limit).sum())
        if count:
            end = ends[count - 1]
            yield Window(Example(ids[:end], labels[:end], place), count, turn)
        elif turn < turns[done]:  # skip earlier turns without targets
            turn += 1
            continue
        done += max(1, count)
        if done < len(turns) and count < len(ends):
            turn = turns[done]


def conversation_windows(
    conversation: Conversation, template: ChatTemplate, limit: int
) -> Iterator[Window]:
    """The windows of a conversation, of at most `limit` tokens. ValueError from the template."""
    messages, place, targets, tools = conversation
    answers = [i for i in conversation.answers if targets is None or i in targets]
    starts = turn_starts(messages)

    def part(turn: int, first: int) -> _Part:
        """Rendered anew, because a template may write the first or last turn differently."""
        skipped, stop = starts[turn] - starts[0], len(messages)
        while True:
            near = [i for i in answers[first : first + limit + 1] if i < stop]
            if len(near) > limit:  # more cannot fit, since each takes at least a token
                stop = near[-1] + 1
            said = [*messages[: starts[0]], *messages[starts[turn] : stop]]
            try:
                found = template.encode(said, targets={i - skipped for i in near}, tools=tools)
            except ReasoningOmittedError as error:  # it is written in the last turn only
                if error.message + skipped + 1 == stop:
                    raise
                stop = error.message + skipped + 1
                continue
            return *ids_and_labels(found), np.array(found.ends)

    yield from _windows(part, _turns_of(answers, starts), place, limit)


def token_windows(example: Example, tokens: TurnTokens, limit: int) -> Iterator[Window]:
    """The windows of a conversation that is given as token ids and labels. If its ids do not show
    where user messages begin, a turn begins after each answer."""
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
        new[: max(0, befores[first] - here.start)] = IGNORE_INDEX  # targets of another window
        head = np.full(before, IGNORE_INDEX, labels.dtype)
        joined = np.concatenate([ids[:before], ids[here]])
        return joined, np.concatenate([head, new]), ends[first:] - here.start + before

    yield from _windows(part, _turns_of(firsts, starts), place, limit)


def _turns_of(positions: Indices, starts: Indices) -> list[int]:
    """The last turn that starts at or before each position."""
    return (np.searchsorted(starts, positions, side="right") - 1).tolist()


def _occurrences(ids: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """Positions at which the pattern begins."""
    n = len(pattern)
    if not n or len(ids) < n:
        return np.empty(0, np.int64)
    views = np.lib.stride_tricks.sliding_window_view(ids, n)
    return np.flatnonzero((views == np.array(pattern)).all(axis=1))

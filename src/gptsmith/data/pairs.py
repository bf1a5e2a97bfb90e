"""Preferences as examples: pairs are encoded, and divided for training and validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptsmith.arguments import check_several
from gptsmith.chat_template.message import Message, turn_starts
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Example, Examples, ids_and_labels
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.order import permutation
from gptsmith.data.preferences import Pair, PairCounts, read_pairs
from gptsmith.data.report import ReadReport
from gptsmith.data.split import fill_splits, group_rows
from gptsmith.terminal import counted

_SPLIT_KEY = 0x9A125  # another stream of random numbers than the order of the epochs


class Pairs:
    """Pairs as examples: those of pair i are 2 i, the chosen answer, and 2 i + 1, the rejected one.

    questions: a digest of each pair's question. tokens: of both conversations of all pairs.
    """

    def __init__(self, examples: Examples, questions: Sequence[str]) -> None:
        assert len(examples) == 2 * len(questions)
        self.examples, self.questions = examples, questions

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def tokens(self) -> int:
        return self.examples.tokens

    @property
    def fingerprint(self) -> str:
        return self.examples.fingerprint

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer conversation of each pair, (n,) int64."""
        return self.examples.lengths.reshape(-1, 2).max(axis=1, initial=0)

    def take(self, numbers: Sequence[int]) -> Pairs:
        both = [row for i in numbers for row in (2 * i, 2 * i + 1)]
        return Pairs(self.examples.take(both), [self.questions[i] for i in numbers])

    def split(self, val_fraction: float, seed: int) -> tuple[Pairs, Pairs]:
        """Random parts for training and validation. Pairs with the same question stay together.

        ValueError if all pairs have the same question.
        """
        groups = [*group_rows(self.questions).values()]
        if len(groups) < 2:
            raise ValueError(
                f"{counted(len(groups), 'question')} cannot be divided into training and validation"
            )
        order = permutation(len(groups), seed, 0, _SPLIT_KEY).tolist()
        first, rest = order[0], order[1:-1]  # at least one question for each
        room = max(0, round(val_fraction * len(self)) - len(groups[first]))
        more, others = fill_splits(rest, [room], [*map(len, groups)])
        val, train = (
            sorted(row for group in chosen for row in groups[group])
            for chosen in ([first, *more], [order[-1], *others])
        )
        return self.take(train), self.take(val)


def load_pairs(
    sources: Sequence[str | Path], files: PreferenceFiles, template: ChatTemplate, T: int
) -> tuple[Pairs, PairCounts]:
    """The pairs of a data set for rows of T tokens. ValueError if none is left."""
    check_several(sources, "sources")
    counts = PairCounts(T, ReadReport(files.on_error))
    where = " ".join(map(str, sources))
    return encode_pairs(read_pairs(sources, files, counts), template, counts, where), counts


def encode_pairs(
    found: Iterable[Pair], template: ChatTemplate, counts: PairCounts, where: str
) -> Pairs:
    """Pairs as examples; those that are not used are counted. ValueError if none is left.

    where: where the pairs are from, for the error.
    """
    template.check_prefix_preserving()
    questions: list[str] = []

    def examples() -> Iterator[Example]:
        for pair in found:
            if encoded := encode_pair(pair, template, counts):
                questions.append(_digest(pair.question))
                yield from encoded

    pairs = Pairs(Examples(examples()), questions)
    if not pairs:
        raise ValueError(f"{where}: no pair is left: {counts}")
    return pairs


def _digest(question: Sequence[Message]) -> str:
    text = json.dumps(question, sort_keys=True, default=str)  # fields of a table may be dates
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- encoding ------------------------------------------------------------------------------------


def encode_pair(
    pair: Pair, template: ChatTemplate, counts: PairCounts
) -> tuple[Example, Example] | None:
    """The chosen and the rejected conversation, of at most counts.T + 1 tokens each, of which the
    assistant's messages after the shared ones are targets.

    Whole turns at the beginning are left out, the same of both, until they fit. None for pairs that
    do not fit, or do not differ in tokens.
    """
    place, limit = pair.chosen.place, counts.T + 1
    starts = [i for i in turn_starts(pair.chosen.messages) if i < pair.shared]
    for dropped, start in enumerate(starts):
        try:
            chosen, rejected = (
                _encode(side, pair.shared, starts[0], start, template)
                for side in (pair.chosen, pair.rejected)
            )
        except ValueError as error:
            counts.report.reject("conversation that the template rejects", place, str(error))
            return None
        if chosen is None or rejected is None:
            counts.left_out.add("with an answer whose weight is 0", place)
            return None
        if max(len(chosen.ids), len(rejected.ids)) > limit:
            continue
        if np.array_equal(chosen.ids, rejected.ids):
            counts.left_out.add("with equal answers", place)
            return None
        for name in template.ignored_fields(pair.chosen.messages):
            counts.report.hint(f"field {name!r} of messages is not used")
        if dropped:
            counts.remarks.add("without their first turns, which do not fit", place)
        counts.kept += 1
        return chosen, rejected
    counts.left_out.add(f"longer than {limit:,} tokens", place)
    return None


def _encode(
    side: Conversation, shared: int, first: int, start: int, template: ChatTemplate
) -> Example | None:
    """A conversation without its messages first..start-1, up to the end of its last target; None
    without targets."""
    messages, place, targets, tools = side
    said = [*messages[:first], *messages[start:]]
    scored = {
        i - (start - first)
        for i in side.answers
        if i >= shared and (targets is None or i in targets)
    }
    if not scored:
        return None
    found = template.encode(said, targets=scored, tools=tools)
    ids, labels = ids_and_labels(found)
    end = found.ends[-1]
    return Example(ids[:end], labels[:end], place)

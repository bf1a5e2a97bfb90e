"""Examples from tables that hold token ids and labels already, made by other tools.

Labels equal input_ids (the model shifts) or are shifted already; which of the two is found by
comparing all rows, or asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template import ChatTemplate
from gptsmith.data.conversations import answer_ends
from gptsmith.data.documents import Reader
from gptsmith.data.examples import Example
from gptsmith.data.options import Labels
from gptsmith.data.tokenized import LABELS, token_rows
from gptsmith.tokenizer import Tokenizer


def token_examples(
    paths: Sequence[Path], labels: Labels, vocab_size: int, reader: Reader
) -> Iterator[Example]:
    """Rows of input_ids and labels as examples, whose labels stand at their own token.

    ValueError for ids outside the vocabulary, and if it cannot be told how the labels lie.
    """
    kind = _kind_of_labels(paths, reader) if labels == "auto" else labels
    for place, ids, targets in _labelled_rows(paths, reader):
        if kind == "shifted":  # the last label is a token more, unless it is no token
            ids = np.append(ids, targets[-1:][targets[-1:] != IGNORE_INDEX])
            targets = np.concatenate([np.array([IGNORE_INDEX]), targets])[: len(ids)]
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"{place}: token id {bad} is outside the tokenizer's 0..{vocab_size - 1}; give "
                "the tokenizer that made these ids"
            )
        if (targets != ids)[targets != IGNORE_INDEX].any():
            raise ValueError(f"{place}: these labels are not {kind}, as --labels {labels} says")
        targets[:1] = IGNORE_INDEX  # the first token follows nothing
        yield Example(ids.astype(np.int32), targets.astype(np.int32), place)


def _kind_of_labels(paths: Sequence[Path], reader: Reader) -> Literal["shifted", "unshifted"]:
    """Whether labels equal input_ids or the ids one further on, found by comparing all rows."""
    rows = unshifted = shifted = 0
    for place, ids, labels in _labelled_rows(paths, reader):
        scored = labels != IGNORE_INDEX
        same = bool((labels == ids)[scored].all())
        ahead = bool((labels[:-1] == ids[1:])[scored[:-1]].all())
        if not same and not ahead:
            raise ValueError(f"{place}: labels are neither input_ids nor the ids one further on")
        rows, unshifted, shifted = rows + 1, unshifted + same, shifted + ahead
    if unshifted == rows and shifted < rows:
        return "unshifted"
    if shifted == rows and unshifted < rows:
        return "shifted"
    why = "both readings fit" if unshifted == rows else "some rows are, some are not"
    raise ValueError(
        f"{paths[0]}: cannot tell whether labels are shifted already ({why}); say --labels "
        "unshifted (each stands at its own token) or --labels shifted (one before it)"
    )


def _labelled_rows(
    paths: Sequence[Path], reader: Reader
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Place, ids and labels of every row, padding left out."""
    for place, ids, labels in token_rows(paths, reader):
        if labels is None:
            raise ValueError(
                f"{place}: no column {LABELS!r}, so it is not said which tokens are learned; add "
                "one with -100 for the others, or give the conversations as text"
            )
        if len(labels) != len(ids):
            raise ValueError(f"{place}: {len(labels)} labels for {len(ids)} input_ids")
        yield place, ids, labels


def ended(
    examples: Iterable[Example], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[Example]:
    """The examples as they are, after a look at where their answers end.

    ValueError if an answer's end token is outside the loss, at once, and if no answer at all ends
    with one: a model trained on these would not stop.
    """
    stops = np.array(template.stop_ids)
    name = tokenizer.decode(template.stop_ids[:1])
    place, answers, stopped = "", 0, 0
    for example in examples:
        ids, labels, here = example
        ends = answer_ends(labels)
        last = np.isin(ids[ends - 1], stops)
        following = np.isin(np.append(ids, -1)[ends], stops)
        if (following & ~last).any():
            raise ValueError(
                f"{here}: {name} after an answer is not learned (its label is -100): the model "
                "would never stop; score the end token, or give the conversations as text"
            )
        place, answers, stopped = place or here, answers + len(ends), stopped + int(last.sum())
        yield example
    if answers and not stopped:
        raise ValueError(
            f"{place}: none of the {answers:,} answers of this set ends with {name}: it was made "
            "with another chat template or tokenizer"
        )

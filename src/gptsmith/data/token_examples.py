"""Examples from tables of token ids and labels made by other tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data import token_tables
from gptsmith.data.examples import Example, answer_ends
from gptsmith.data.options import Labels
from gptsmith.data.report import ReadReport


def token_examples(
    paths: Sequence[Path], labels: Labels, vocab_size: int, report: ReadReport
) -> Iterator[Example]:
    """Rows of input_ids and labels as examples, whose labels are unshifted.

    labels: whether the table's labels are shifted; "auto" detects it. ValueError for ids outside
    the vocabulary, and if it is ambiguous whether labels are shifted.
    """
    kind = labels
    if kind == "auto":
        detector = token_tables.ShiftDetector(
            "use --labels unshifted (each at its own token) or --labels shifted (one before it)"
        )
        for row in token_tables.token_rows(paths, report):
            detector.add(row.place, row.ids, _labels(row))
        kind = detector.result(paths[0])
    for row in token_tables.token_rows(paths, report):
        place, ids, targets = row.place, row.ids, _labels(row)
        if kind == "shifted":
            ids = token_tables.with_last_label(ids, targets)
            targets = np.concatenate([np.array([IGNORE_INDEX]), targets])[: len(ids)]
        token_tables.check_ids(place, ids, vocab_size)
        if (targets != ids)[targets != IGNORE_INDEX].any():
            raise ValueError(f"{place}: these labels are not {kind}, as --labels {labels} says")
        targets[:1] = IGNORE_INDEX  # nothing comes before the first token to predict it from
        yield Example(ids.astype(np.int32), targets.astype(np.int32), place)


def _labels(row: token_tables.TokenRow) -> np.ndarray:
    if row.labels is None:
        raise ValueError(
            f"{row.place}: no column {token_tables.LABELS!r} to say which tokens are targets; add "
            "one, with -100 for all others, or give the conversations as text"
        )
    return row.labels


def check_stop_token_trained(
    examples: Iterable[Example], template: ChatTemplate
) -> Iterator[Example]:
    """Yield the examples, checking that the model learns to end its answers.

    ValueError if the end token after an answer is not a target, or, after the last example, if no
    answer ends with one: a model trained on them would not stop.
    """
    stops, tokens = np.array(template.stop_ids), template.turn_tokens()
    name = template.tokenizer.decode(template.stop_ids[:1])
    first, answers, stopped = "", 0, 0
    for example in examples:
        ids, _, place = example
        ends = answer_ends(example, tokens)
        last = np.isin(ids[ends - 1], stops)
        following = np.isin(np.append(ids, -1)[ends], stops)
        if (following & ~last).any():
            raise ValueError(
                f"{place}: {name} after an answer is not a target (its label is -100): the model "
                "would never stop; give it a label, or give the conversations as text"
            )
        first, answers, stopped = first or place, answers + len(ends), stopped + int(last.sum())
        yield example
    if answers and not stopped:
        raise ValueError(
            f"{first}: none of the {answers:,} answers of this set ends with {name}: it was made "
            "with another chat template or tokenizer"
        )

"""Labelled texts for classification: three splits, encoding, and batches of padded rows.

No text is in two splits, since the model could have memorized its label.
B batch, T time (of the longest row in the batch).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gptsmith.arguments import check_several
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.encode import encode_at
from gptsmith.data.labelled import LabelledText, read_labelled
from gptsmith.data.options import LabelledConfig
from gptsmith.data.order import StepSortedOrder, evenly_spaced, permutation
from gptsmith.data.report import ReadReport
from gptsmith.data.split import fill_splits, group_rows
from gptsmith.terminal import counted
from gptsmith.tokenizer import Tokenizer

_MULTIPLE = 8  # padded lengths are rounded up to this, which suits matrix products


@dataclass(frozen=True)
class LabelledSet:
    """A data set in three splits. notes: for the user, what was detected, decided and skipped."""

    labels: tuple[str, ...]  # sorted: as numbers, if all of them are
    train: list[LabelledText]
    val: list[LabelledText]
    test: list[LabelledText]
    notes: list[str]

    @property
    def fingerprint(self) -> str:
        """sha256 over the texts and labels of all splits, in order."""
        digest = hashlib.sha256()
        for name in ("train", "val", "test"):
            for row in getattr(self, name):
                digest.update(f"{name}\t{row.label}\t{row.text}\0".encode())
        return digest.hexdigest()


def load_labelled(config: LabelledConfig) -> LabelledSet:
    """Read and split as configured; everything is held in memory.

    ValueError or FileNotFoundError naming the place: columns that are not obvious, rows without
    text or label (unless skipped), labels that are in the test only, a single label.
    """
    report = ReadReport(config.on_error)
    rows, val, test = (
        [row for path in paths if path is not None for row in read_labelled(path, config, report)]
        for paths in (config.data, [config.val], [config.test])
    )
    data = " ".join(map(str, config.data))
    notes = [*report.hints, *report.lines()]
    labels = sort_labels({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError(f"{data}: all texts are labelled {labels[0]!r}; give at least two labels")
    for row in (*val, *test):
        if row.label not in labels:
            raise ValueError(f"{row.place}: label {row.label!r} is not in {data}")
    pairs = Counter(key for key, _ in {(_key(row), row.label) for row in rows})
    if contradictions := sum(count > 1 for count in pairs.values()):
        notes.append(f"{counted(contradictions, 'text')} with different labels")
    if config.deduplicate:
        before = len(rows) + len(val) + len(test)
        rows, val, test = map(_unique, (rows, val, test))
        dropped = before - len(rows) - len(val) - len(test)
        notes.append(f"{counted(dropped, 'repeated text')} dropped")
    if val and test:
        val = _without(val, test, "validation", "the test", notes)
    if val or test:
        rows = _without(rows, (*val, *test), "training", "validation or test", notes)
    shares = (
        0.0 if config.test else config.test_fraction,
        0.0 if config.val else config.val_fraction,
    )
    more_test, more_val, train = _split(rows, labels, shares, config.split_seed, notes)
    val, test = val or more_val, test or more_test
    if config.balance:
        train = _balance(train, labels, config.split_seed, notes)
    missing = [label for label in labels if label not in {row.label for row in train}]
    if missing or not val or not test:
        what = f"label {missing[0]!r} is not in the training" if missing else "nothing is in one"
        raise ValueError(f"{data}: too few texts, {what} split: give more, or larger shares")
    for name, part in (("train", train), ("val", val), ("test", test)):
        counts = Counter(row.label for row in part)
        shown = ", ".join(f"{label} {counts[label]:,}" for label in labels[:10])
        notes.append(
            f"{name}: {counted(len(part), 'text')} ({shown}{', ...' if len(labels) > 10 else ''})"
        )
    return LabelledSet(labels, train, val, test, notes)


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Sorted as numbers, if all are numbers, else as text."""
    numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (float(label) if numbers else 0, label)))


# --- splits --------------------------------------------------------------------------------------


def _key(row: LabelledText) -> str:
    """A key that is equal for texts that differ only in white space."""
    return " ".join(row.text.split())


def _unique(rows: Sequence[LabelledText]) -> list[LabelledText]:
    return list({_key(row): row for row in reversed(rows)}.values())[::-1]


def _without(
    rows: list[LabelledText],
    others: Sequence[LabelledText],
    name: str,
    where: str,
    notes: list[str],
) -> list[LabelledText]:
    """`rows` without the texts of `others`."""
    taken = {_key(row) for row in others}
    kept = [row for row in rows if _key(row) not in taken]
    if dropped := len(rows) - len(kept):
        notes.append(f"{counted(dropped, f'{name} text')} dropped, found in {where} too")
    return kept


def _split(
    rows: Sequence[LabelledText],
    labels: Sequence[str],
    shares: tuple[float, float],
    seed: int,
    notes: list[str],
) -> list[list[LabelledText]]:
    """Test, validation and training split: the shares (test, val) of each label's texts, with
    copies of a text in one split.

    If a label has too few texts, the training split comes first, then test, then validation.
    """
    groups = list(group_rows(map(_key, rows)).values())
    chosen: list[list[int]] = [[], [], []]
    for number, label in enumerate(labels):
        texts = [rows_of for rows_of in groups if rows[rows_of[0]].label == label]
        total = sum(map(len, texts))
        room = [max(1, round(share * total)) if share else 0 for share in shares]
        if len(texts) <= sum(share > 0 for share in shares):
            notes.append(
                f"label {label!r} has {counted(len(texts), 'text')}: too few for every split"
            )
            room = [len(texts) - 1, 0]
        order = permutation(len(texts), seed, number).tolist()
        for into, found in zip(
            chosen, fill_splits(order, room, list(map(len, texts))), strict=True
        ):
            into += [row for at in found for row in texts[at]]
    if copies := len(rows) - len(groups):
        notes.append(f"{copies:,} of {len(rows):,} texts repeat another one: copies share a split")
    return [[rows[i] for i in sorted(part)] for part in chosen]


def _balance(
    rows: list[LabelledText], labels: Sequence[str], seed: int, notes: list[str]
) -> list[LabelledText]:
    """As many rows of each label as the rarest one has, drawn at random, in the original order."""
    places = [[i for i, row in enumerate(rows) if row.label == label] for label in labels]
    least = min(map(len, places))
    kept = [
        found[i]
        for number, found in enumerate(places)
        for i in permutation(len(found), seed, number, 1)[:least]
    ]
    notes.append(f"balanced: {least:,} training texts of each label, {len(rows):,} before")
    return [rows[i] for i in sorted(kept)]


# --- ids -----------------------------------------------------------------------------------------


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], T: int
) -> tuple[list[np.ndarray], int]:
    """Ids of each text, stripped and truncated to T tokens including those that the tokenizer adds
    around a text, and the number of texts that were truncated.

    ValueError for a text that has no token.
    """
    check_several(texts, "texts")
    special = tokenizer.special_ids
    prefix, suffix = np.array(special.prefix, np.int64), list(special.suffix)
    while suffix and suffix[-1] == special.pad:  # a classifier reads up to the padding
        suffix.pop()
    room = T - len(prefix) - len(suffix)
    ids = tokenizer.encode_arrays([text.strip() for text in texts])
    for text, row in zip(texts, ids, strict=True):
        if not len(row):
            raise ValueError(f"text {text[:40]!r} has no token: there is nothing to classify")
    truncated = sum(len(row) > room for row in ids)
    end = np.array(suffix, np.int64)
    return [np.concatenate([prefix, row[:room], end]) for row in ids], truncated


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as ids, the class index of each, and the number of truncated texts."""

    ids: list[np.ndarray]
    classes: list[int]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def take(self, count: int) -> EncodedTexts:
        """`count` texts, evenly spaced; at least one, at most all."""
        rows = evenly_spaced(len(self.ids), max(1, count))
        return replace(
            self, ids=[self.ids[i] for i in rows], classes=[self.classes[i] for i in rows]
        )


def encode_labelled(
    tokenizer: Tokenizer, rows: Sequence[LabelledText], labels: Sequence[str], T: int
) -> EncodedTexts:
    """`encode_texts` of labelled texts; ValueError naming the place of one that has no token."""
    number = {label: i for i, label in enumerate(labels)}
    texts = [(row.place, row.text) for row in rows]
    ids, truncated = encode_at(texts, lambda texts: encode_texts(tokenizer, texts, T))
    return EncodedTexts(ids, [number[row.label] for row in rows], truncated)


# --- batches -------------------------------------------------------------------------------------


def pad(rows: Sequence[np.ndarray], pad_id: int, limit: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with padding on the right, T a multiple of 8 up to limit, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    T = min(limit, -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE)
    ids = torch.full((len(rows), T), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return ids, lengths


class LabelledRows(StepSortedOrder):
    """Samples of a classifier: an epoch takes each text once, in a new order, within each step by
    length.

    T: at least the length of the longest text. step: samples of one optimizer step. documents:
    padding is marked as another document, for masks that look ahead.
    """

    def __init__(
        self,
        texts: EncodedTexts,
        T: int,
        seed: int,
        pad_id: int,
        step: int = 1,
        documents: bool = False,
    ) -> None:
        super().__init__([*map(len, texts.ids)], seed, step)
        self.texts, self.T, self.pad_id = texts, T, pad_id
        self.documents = documents

    def batch(self, first: int, count: int) -> Batch:
        """Samples first..first+count-1. targets hold the class number at each row's last token."""
        found = [self.item(i) for i in range(first, first + count)]
        ids, lengths = pad([self.texts.ids[i] for i in found], self.pad_id, self.T)
        at = torch.arange(ids.shape[1])
        last = (lengths - 1).unsqueeze(1)  # (B, 1)
        classes = torch.tensor([self.texts.classes[i] for i in found]).unsqueeze(1)
        return Batch(
            inputs=ids,
            targets=torch.where(at == last, classes, IGNORE_INDEX),
            documents=(at > last).long() if self.documents else None,
            name=f"samples {first}..{first + count - 1}",
            tokens=int(lengths.sum()),
        )

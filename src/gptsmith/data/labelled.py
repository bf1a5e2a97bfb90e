"""Labelled texts for classification, in three splits.

One text never stands in two splits: a model could then score by memory what it should judge.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from gptsmith.data.dataset import permutation
from gptsmith.data.labelled_files import LabelledFiles, LabelledText
from gptsmith.data.options import LabelledConfig
from gptsmith.data.report import ReadReport


@dataclass(frozen=True)
class Labelled:
    """A data set in three splits. `notes` say what was found, decided and left out."""

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


def load_labelled(config: LabelledConfig) -> Labelled:
    """Read and split as the config says; everything is held in memory.

    Raises ValueError or FileNotFoundError naming the place: columns that are not obvious, rows
    without text or label (unless skipped), labels that only a test knows, a single label.
    """
    report = ReadReport(config.on_error)
    files = LabelledFiles(config.text_column, config.label_column, report)
    rows = files.read(config.data)
    val = files.read(config.val) if config.val else []
    test = files.read(config.test) if config.test else []
    notes = files.notes
    notes += report.skipped.lines()
    labels = sort_labels({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError(
            f"{config.data}: all texts are labelled {labels[0]!r}: two labels at least"
        )
    for row in (*val, *test):
        if row.label not in labels:
            raise ValueError(f"{row.place}: label {row.label!r} is not in {config.data}")
    contradictions = _contradictions(rows)
    if contradictions:
        notes.append(f"{contradictions:,} texts occur with different labels")
    if config.deduplicate:
        before = len(rows) + len(val) + len(test)
        rows, val, test = _unique(rows), _unique(val), _unique(test)
        left = before - len(rows) - len(val) - len(test)
        notes.append(f"{left:,} repeated texts left out")
    if val and test:
        val = _without(val, test, "validation", "the test", notes)
    if val or test:
        rows = _without(rows, (*val, *test), "training", "validation or test", notes)
    shares = (
        0.0 if config.test else config.test_fraction,
        0.0 if config.val else config.val_fraction,
    )
    train, more_val, more_test = _split(rows, labels, shares, config.split_seed, notes)
    val, test = val or more_val, test or more_test
    if config.balance:
        train = _balance(train, labels, config.split_seed, notes)
    missing = [label for label in labels if label not in {row.label for row in train}]
    if missing or not val or not test:
        what = f"label {missing[0]!r} is not in the training" if missing else "nothing is in a"
        raise ValueError(f"{config.data}: too few texts, {what} split: give more, or larger shares")
    for name, part in (("train", train), ("val", val), ("test", test)):
        counts = Counter(row.label for row in part)
        shown = ", ".join(f"{label} {counts[label]:,}" for label in labels[:10])
        notes.append(f"{name}: {len(part):,} texts ({shown}{', ...' if len(labels) > 10 else ''})")
    return Labelled(labels, train, val, test, notes)


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """In the order of their numbers, if all are numbers, else of their characters."""
    numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (float(label) if numbers else 0, label)))


# --- splitting -----------------------------------------------------------------------------------


def _key(row: LabelledText) -> str:
    """Equal for texts that differ in white space only."""
    return " ".join(row.text.split())


def _contradictions(rows: Iterable[LabelledText]) -> int:
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(_key(row), set()).add(row.label)
    return sum(len(found) > 1 for found in labels.values())


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
    if left := len(rows) - len(kept):
        notes.append(f"{left:,} {name} texts left out, because they are in {where} too")
    return kept


def _split(
    rows: Sequence[LabelledText],
    labels: Sequence[str],
    shares: tuple[float, float],
    seed: int,
    notes: list[str],
) -> tuple[list[LabelledText], list[LabelledText], list[LabelledText]]:
    """Train, val and test: of each label the shares (test, val), copies of a text together.

    Each text of a label goes, in random order, where there is room for all its copies. A label
    with too few texts is in the training split first, then in the test, then in validation.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_key(row), []).append(i)
    by_label: dict[str, list[list[int]]] = {label: [] for label in labels}
    for group in groups.values():
        by_label[rows[group[0]].label].append(group)
    parts: dict[int, list[int]] = {0: [], 1: []}
    for number, label in enumerate(labels):
        texts = by_label[label]
        total = sum(map(len, texts))
        room = [max(1, round(share * total)) if share else 0 for share in shares]
        if len(texts) <= sum(share > 0 for share in shares):
            notes.append(f"label {label!r} has {len(texts)} texts: too few for every split")
            room = [len(texts) - 1, 0]
        for at in permutation(len(texts), seed, number):
            into = next((i for i in parts if len(texts[at]) <= room[i]), None)
            if into is not None:
                room[into] -= len(texts[at])
                parts[into] += texts[at]
    if copies := sum(len(group) - 1 for group in groups.values()):
        notes.append(f"{copies:,} of {len(rows):,} texts repeat another one: copies share a split")
    rest = sorted(set(range(len(rows))).difference(*parts.values()))
    train, test, val = ([rows[i] for i in sorted(part)] for part in (rest, *parts.values()))
    return train, val, test


def _balance(
    rows: list[LabelledText], labels: Sequence[str], seed: int, notes: list[str]
) -> list[LabelledText]:
    """As many rows of each label as the rarest has, drawn without replacement, in their order."""
    places = {label: [i for i, row in enumerate(rows) if row.label == label] for label in labels}
    least = min(map(len, places.values()))
    kept: list[int] = []
    for number, found in enumerate(places.values()):
        order = permutation(len(found), seed, number, 1)
        kept += [found[i] for i in order[:least]]
    notes.append(f"balanced: {least:,} training texts of each label, {len(rows):,} before")
    return [rows[i] for i in sorted(kept)]

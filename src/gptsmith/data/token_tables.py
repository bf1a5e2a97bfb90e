"""Tables of token ids, in a column input_ids and optionally labels.

Such files differ in two ways, which are detected by comparing all rows; ambiguous files are
rejected. Labels equal input_ids (the model shifts them), or are shifted already (labels[i] =
input_ids[i + 1], so that the last label of a row is an additional token). And rows are documents,
or blocks of equal length cut from one stream, as packing scripts write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from gptsmith.data.columnar import SUFFIXES, read_batches, read_schema
from gptsmith.data.columns import TOKEN_IDS, choose_column
from gptsmith.data.documents import Document
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.tokenizer import DocumentTokens

IDS, LABELS, MASK = TOKEN_IDS, "labels", "attention_mask"
_IGNORED = -100  # batch.IGNORE_INDEX, which would import torch


class TokenRow(NamedTuple):
    """place; ids (n,) int64; labels (n,) int64 if the table has them."""

    place: str
    ids: np.ndarray
    labels: np.ndarray | None


def find_token_tables(paths: Sequence[Path]) -> list[Path]:
    """The files, if they are tables of token ids; none if no file is. ValueError for a mixture."""
    tables = [p for p in paths if has_suffix(p, *SUFFIXES) and _columns(p, IDS)]
    if 0 < len(tables) < len(paths):
        other = next(path for path in paths if path not in tables)
        raise ValueError(f"{tables[0]} holds token ids, {other} does not; use them separately")
    return tables


def token_rows(paths: Sequence[Path], report: ReadReport) -> Iterator[TokenRow]:
    """All rows in order, without padding (attention_mask 0).

    ValueError for columns of another type, and for a row with more or fewer labels than ids.
    """
    for path in paths:
        columns = _columns(path, IDS, LABELS, MASK)
        number = 0
        for batch in read_batches(path, list(columns.values()), report):
            lists = {name: _lists(path, own, batch.column(own)) for name, own in columns.items()}
            for i in range(len(batch)):
                number += 1
                place = f"{path}, row {number}"
                ids, labels = lists[IDS][i], lists[LABELS][i] if LABELS in lists else None
                if labels is not None and len(labels) != len(ids):
                    raise ValueError(f"{place}: {len(labels)} labels for {len(ids)} input_ids")
                if MASK in lists:
                    real = lists[MASK][i] != 0
                    ids, labels = ids[real], None if labels is None else labels[real]
                yield TokenRow(place, ids, labels)


def _columns(path: Path, *names: str) -> dict[str, str]:
    """The columns of these names that a file has, each under its own name, as `Input_IDs`."""
    own = read_schema(path).names
    found = {name: choose_column(own, None, (name,), str(path)) for name in names}
    return {name: column for name, column in found.items() if column is not None}


def _lists(path: Path, name: str, column: pa.Array) -> list[np.ndarray]:
    kind, types = column.type, pa.types
    is_fixed = types.is_fixed_size_list(kind)
    is_list = is_fixed or types.is_list(kind) or types.is_large_list(kind)
    if not is_list or not types.is_integer(kind.value_type):
        raise ValueError(f"{path}: column {name!r} holds {kind}, not lists of token ids")
    if column.null_count or column.flatten().null_count:
        raise ValueError(f"{path}: column {name!r} has empty (null) entries")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(flat) and (largest := flat.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: column {name!r} holds {largest}, which no token id can be")
    lengths = [kind.list_size] * len(column) if is_fixed else np.diff(np.asarray(column.offsets))
    return np.split(flat.astype(np.int64), np.cumsum(lengths)[:-1])


# --- tables as a source --------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenTables:
    """Tables of token ids, and how they are arranged.

    labels   "none", "unshifted" or "shifted"
    stream   the rows are consecutive blocks of one stream
    """

    files: tuple[Path, ...]
    labels: str
    stream: bool
    rows: int

    def __str__(self) -> str:
        rows = "consecutive blocks of one stream" if self.stream else "one document each"
        return f"{self.rows} rows of token ids, {rows}, labels: {self.labels}"

    def documents(
        self, document_tokens: DocumentTokens, vocab_size: int, report: ReadReport
    ) -> Iterator[Document]:
        """The rows as documents, without their document tokens, or all rows as one document.

        ValueError for an id outside the vocabulary.
        """

        def checked() -> Iterator[TokenRow]:
            for row in token_rows(self.files, report):
                check_ids(row.place, row.ids, vocab_size)
                yield row

        if self.stream:
            chunks = _Stream(checked, self.labels == "shifted")
            yield Document(str(self.files[0]), chunks, delimited=False)
            return
        for place, ids, labels in checked():
            if self.labels == "shifted" and labels is not None:
                ids = with_last_label(ids, labels)
            ids = without_document_tokens(ids, document_tokens)
            if len(ids) == 0:
                report.reject("empty document", place, "an empty document")
            else:
                yield Document(place, (ids,))


class ShiftDetector:
    """Detects from all rows together whether labels are shifted.

    remedy: for errors, what the user can do if it is ambiguous.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.rows = self.unshifted = self.shifted = 0

    def add(self, place: str, ids: np.ndarray, labels: np.ndarray) -> None:
        """Add one row. ValueError if its labels are neither shifted nor unshifted."""
        is_target = labels != _IGNORED
        same = bool((labels == ids)[is_target].all())
        ahead = bool((labels[:-1] == ids[1:])[is_target[:-1]].all())
        if not same and not ahead:
            raise ValueError(
                f"{place}: labels are neither input_ids nor input_ids shifted by one; {self.remedy}"
            )
        self.rows, self.unshifted = self.rows + 1, self.unshifted + same
        self.shifted += ahead

    def result(self, name: Path) -> Literal["shifted", "unshifted"]:
        """The kind of labels that fits all rows; ValueError if both do, or neither."""
        same, ahead = self.unshifted == self.rows, self.shifted == self.rows
        if same == ahead:
            why = "both readings fit" if same else "some rows fit one reading, some the other"
            raise ValueError(
                f"{name}: cannot tell whether labels are shifted ({why}); {self.remedy}"
            )
        return "unshifted" if same else "shifted"


def open_token_tables(paths: Sequence[Path], report: ReadReport) -> TokenTables:
    """Detect the arrangement from the rows of all files. ValueError if it is ambiguous."""
    detector = ShiftDetector("remove the column labels if the ids alone are right")
    count, joined, last_label = 0, True, None
    first, equal, ended = 0, True, False  # the last block of a packing script may be shorter
    for place, ids, labels in token_rows(paths, report):
        count += 1
        first = first or len(ids)
        equal = equal and not ended and len(ids) <= first
        ended = ended or len(ids) < first
        if labels is None:
            continue
        detector.add(place, ids, labels)
        joined = joined and (last_label is None or (len(ids) > 0 and last_label == ids[0]))
        last_label = labels[-1] if len(labels) else _IGNORED
    if not count:
        raise ValueError(f"{paths[0]}: no rows")
    if detector.rows not in (0, count):
        raise ValueError(f"{paths[0]}: only {detector.rows} of {count} rows have labels")
    equal = equal and count > 1 and first > 0
    if not detector.rows:
        return TokenTables(tuple(paths), "none", equal, count)
    kind = detector.result(paths[0])
    return TokenTables(tuple(paths), kind, equal and (joined or kind == "unshifted"), count)


def without_document_tokens(ids: np.ndarray, document_tokens: DocumentTokens) -> np.ndarray:
    """A document's ids without the tokens that begin and end it."""
    first, last = document_tokens.before, document_tokens.after or document_tokens.before
    if last and np.array_equal(ids[-len(last) :], last):
        ids = ids[: -len(last)]
    if first and np.array_equal(ids[: len(first)], first):
        ids = ids[len(first) :]
    return ids


class _Stream:
    """All rows in order; if labels are shifted, also the last token, which only labels contain."""

    def __init__(self, rows: Callable[[], Iterator[TokenRow]], shifted: bool) -> None:
        self.rows, self.shifted = rows, shifted

    def __iter__(self) -> Iterator[np.ndarray]:
        last = np.empty(0, np.int64)
        for _, ids, labels in self.rows():
            if len(ids):
                yield ids
                last = ids[:0] if labels is None else labels[-1:]
        if self.shifted and len(last) and last[0] != _IGNORED:
            yield last


def check_ids(place: str, ids: np.ndarray, vocab_size: int) -> None:
    """ValueError naming an id outside the vocabulary."""
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise ValueError(
            f"{place}: token id {wrong[0]} is outside the tokenizer's 0..{vocab_size - 1}; "
            "give the tokenizer that made these ids"
        )


def with_last_label(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The ids plus the last label, which is the additional token of a shifted row, unless -100."""
    return np.append(ids, labels[-1:][labels[-1:] != _IGNORED])

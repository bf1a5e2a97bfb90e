"""Arrow and Parquet files that hold token ids already: columns input_ids and, it may be, labels.

Two things differ between such files, and both are found by comparison, or the file is refused:
labels equal input_ids (the model shifts) or are shifted already (labels[i] = input_ids[i + 1], so
that each row hides one more token, its last label); and rows are documents, or blocks of equal
length cut from one stream, as the packing scripts of the field write them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gptsmith.data.documents import Document, Reader
from gptsmith.data.tables import table_batches, table_schema

IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
_IGNORED = -100  # a label that is not scored


class Layout(NamedTuple):
    """What comparison of all rows found."""

    labels: str  # "none", "unshifted" or "shifted"
    stream: bool  # rows are consecutive blocks of one stream
    rows: int

    def __str__(self) -> str:
        rows = "consecutive blocks of one stream" if self.stream else "one document each"
        return f"{self.rows} rows of token ids, {rows}, labels: {self.labels}"


def holds_ids(path: Path) -> bool:
    return IDS in table_schema(path).names


def examine(paths: Sequence[Path], reader: Reader) -> Layout:
    """The layout of the rows of all files together. ValueError if comparison cannot tell it."""
    count, fits = 0, {"unshifted": 0, "shifted": 0}
    labelled, joined, last_label = 0, True, None
    first, equal, ended = 0, True, False  # a packing script's last block may be shorter
    for place, ids, labels in token_rows(paths, reader):
        count += 1
        first = first or len(ids)
        equal = equal and not ended and len(ids) <= first
        ended = ended or len(ids) < first
        if labels is None:
            continue
        labelled += 1
        if len(labels) != len(ids):
            raise ValueError(f"{place}: {len(labels)} labels for {len(ids)} input_ids")
        scored = labels != _IGNORED
        same = bool((labels == ids)[scored].all())
        ahead = bool((labels[:-1] == ids[1:])[scored[:-1]].all())
        if not same and not ahead:
            raise ValueError(
                f"{place}: labels are neither input_ids nor input_ids shifted by one; "
                "remove the column labels if the ids alone are right"
            )
        fits["unshifted"] += same
        fits["shifted"] += ahead
        joined = joined and (last_label is None or (len(ids) > 0 and last_label == ids[0]))
        last_label = labels[-1] if len(labels) else _IGNORED
    if not count:
        raise ValueError(f"{paths[0]}: no rows")
    if labelled not in (0, count):
        raise ValueError(f"{paths[0]}: only {labelled} of {count} rows have labels")
    equal = equal and count > 1
    if not labelled:
        return Layout("none", equal, count)
    shifts = [kind for kind, rows in fits.items() if rows == count]
    if len(shifts) != 1:
        why = "both readings fit" if shifts else "some rows fit one reading, some the other"
        raise ValueError(
            f"{paths[0]}: cannot tell whether labels are shifted ({why}); "
            "remove the column labels if the ids alone are right"
        )
    shifted = shifts[0] == "shifted"
    return Layout(shifts[0], equal and (joined if shifted else True), count)


def tokenized_documents(
    paths: Sequence[Path], layout: Layout, eos_id: int, vocab_size: int, reader: Reader
) -> Iterator[Document]:
    """The rows as documents, or all of them as one. ValueError for an id outside the vocabulary."""

    def checked() -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        for place, ids, labels in token_rows(paths, reader):
            if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
                bad = ids[(ids < 0) | (ids >= vocab_size)][0]
                raise ValueError(
                    f"{place}: token id {bad} is outside the tokenizer's 0..{vocab_size - 1}"
                    "; give the --tokenizer that made these ids"
                )
            yield place, ids, labels

    if layout.stream:
        yield Document(str(paths[0]), _Stream(checked, layout.labels == "shifted"), begins=False)
        return
    for place, ids, labels in checked():
        if layout.labels == "shifted" and labels is not None and len(labels):
            ids = np.append(ids, labels[-1:][labels[-1:] != _IGNORED])
        if len(ids) and ids[-1] == eos_id:  # ours stands before a document, not behind it
            ids = ids[:-1]
        if len(ids) == 0:
            reader.problem("empty document", place, "an empty document")
        else:
            yield Document(place, (ids,), begins=bool(ids[0] != eos_id))


class _Stream:
    """All rows, one after the other; of shifted rows also the one token that only labels hold."""

    def __init__(self, rows, shifted: bool) -> None:  # type: ignore[no-untyped-def]
        self.rows, self.shifted = rows, shifted

    def __iter__(self) -> Iterator[np.ndarray]:
        last = np.empty(0, np.int64)
        for _, ids, labels in self.rows():
            if len(ids):
                yield ids
                last = ids[:0] if labels is None else labels[-1:]
        if self.shifted and len(last) and last[0] != _IGNORED:
            yield last


def token_rows(
    paths: Sequence[Path], reader: Reader
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Place, ids and labels of every row, padding (attention_mask 0) left out."""
    for path in paths:
        names = table_schema(path).names
        columns = [name for name in (IDS, LABELS, MASK) if name in names]
        number = 0
        for batch in table_batches(path, columns, reader):
            lists = {name: _lists(path, name, batch.column(name)) for name in columns}
            for i in range(len(batch)):
                number += 1
                ids, labels = lists[IDS][i], lists[LABELS][i] if LABELS in lists else None
                if MASK in lists:
                    real = lists[MASK][i] != 0
                    ids, labels = ids[real], None if labels is None else labels[real]
                yield f"{path}, row {number}", ids, labels


def _lists(path: Path, name: str, column: pa.Array) -> list[np.ndarray]:
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists or pa.types.is_fixed_size_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{path}: column {name!r} holds {kind}, not lists of token ids")
    if column.null_count or column.flatten().null_count:
        raise ValueError(f"{path}: column {name!r} has empty (null) entries")
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = (
        np.full(len(column), kind.list_size)
        if pa.types.is_fixed_size_list(kind)
        else np.diff(np.asarray(column.offsets))
    )
    return np.split(flat, np.cumsum(lengths)[:-1])

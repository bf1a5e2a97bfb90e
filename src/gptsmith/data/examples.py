"""Examples for fine-tuning, token sequences with labels, in memory or in a memory-mapped file.

The file is Arrow IPC with the common columns `input_ids` and `labels` (unshifted: label i is the id
at i, or -100 if it is not a target), plus `scored` (the number of targets) and `name` (where the
example comes from). An empty record batch at the end carries the totals.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gptsmith import files
from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import Encoded, TurnTokens
from gptsmith.data.columnar import check_arrow, read_schema
from gptsmith.data.order import permutation
from gptsmith.data.split import fill_splits
from gptsmith.terminal import counted

_TOKENS = 1 << 18  # of a record batch, about: 2 MB
_OTHER = "not a file of examples; make one with gptsmith prepare"
_METADATA, _TOTALS = b"gptsmith", "gptsmith_totals"
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("scored", pa.int32()),
        ("name", pa.string()),
    ]
)


class Example(NamedTuple):
    """ids (n,) int32; labels (n,) int32, the id at each position or -100; name: its place."""

    ids: np.ndarray
    labels: np.ndarray
    name: str


def ids_and_labels(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of an example from a conversation that a chat template encoded."""
    ids = np.array(encoded.ids, np.int32)
    return ids, np.where(encoded.is_target, ids, np.int32(IGNORE_INDEX))


def answer_ends(example: Example, tokens: TurnTokens) -> np.ndarray:
    """Where each answer ends (exclusive). Each run of labels other than -100 is one answer, or
    several consecutive ones."""
    ids, labels, _ = example
    is_target = np.append(labels != IGNORE_INDEX, False)
    is_end = is_target[:-1] & ~is_target[1:]
    if tokens.answer:
        is_end[:-1] |= (labels[:-1] == tokens.end) & (ids[1:] == tokens.answer[0])
    return np.flatnonzero(is_end) + 1


def write_examples(
    path: Path,
    examples: Iterable[Example],
    metadata: dict[str, Any],
    closing: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Write examples durably, one record batch at a time.

    metadata: stored as JSON, such as what made the ids and the maximum length of an example.
    closing: returns further metadata that is known only after the last example.
    """
    schema = _SCHEMA.with_metadata({_METADATA: json.dumps(metadata)})
    totals = _Totals()
    with (
        files.atomic_path(path) as temporary,
        temporary.open("wb") as file,  # pyarrow's own errors would name the temporary file
        pa.ipc.new_file(file, schema) as sink,
    ):
        for batch in _batches(examples):
            totals.add(_View.of(batch))
            sink.write_batch(batch.replace_schema_metadata(schema.metadata))
        empty = pa.RecordBatch.from_pylist([], schema=schema)
        last = {"metadata": closing()} | totals.summary()
        sink.write_batch(empty, custom_metadata={_TOTALS: json.dumps(last)})


class Examples(Sequence[Example]):
    """A sequence of examples. Those of a file are read from disk when they are used.

    lengths          number of tokens of each example, (n,) int64
    target_lengths   number of targets of each, (n,) int64
    fingerprint      sha256 over ids and labels, in order
    metadata         what was given to `write_examples`; empty for examples in memory
    """

    def __init__(self, source: str | Path | Iterable[Example]) -> None:
        """A file written by `write_examples` (ValueError for any other), or the examples."""
        self.metadata: dict[str, Any] = {}
        recorded: dict[str, Any] | None = None
        if isinstance(source, str | Path):
            batches, self.metadata, recorded = _open(Path(source))
        else:
            batches = list(_batches(source))
        self._views = [_View.of(batch) for batch in batches]
        totals = _Totals()
        for view in self._views:
            totals.add(view)
        summary = totals.summary()
        if recorded is not None and not summary.items() <= recorded.items():
            raise ValueError(f"{source}: damaged, its ids are not those that were written")
        self._starts = np.cumsum([0, *map(len, batches)])
        self._chosen = np.arange(self._starts[-1])
        nothing = np.empty(0, np.int64)
        self.lengths = np.concatenate([nothing, *(np.diff(view.offsets) for view in self._views)])
        self.target_lengths = np.concatenate([nothing, *(view.scored for view in self._views)])
        self.fingerprint: str = summary["fingerprint"]

    def take(self, numbers: Sequence[int] | np.ndarray) -> Examples:
        """The examples at the given indices, in that order; no tokens are copied."""
        numbers = np.asarray(numbers, dtype=np.int64)
        part = copy.copy(self)
        part._chosen = self._chosen[numbers]
        part.lengths, part.target_lengths = self.lengths[numbers], self.target_lengths[numbers]
        digest = hashlib.sha256(bytes.fromhex(self.fingerprint) + numbers.astype("<i8").tobytes())
        part.fingerprint = digest.hexdigest()
        return part

    def split(self, shares: Sequence[float], seed: int) -> list[Examples]:
        """Split into random disjoint parts of about these shares, with at least one example each.

        Consecutive examples with the same name are windows of one conversation and stay together.
        ValueError if there are fewer conversations than parts.
        """
        starts = self._conversations()
        n, parts = len(starts) - 1, len(shares)
        if n < parts:
            raise ValueError(f"{counted(n, 'conversation')} cannot be divided into {parts} parts")
        spare = n - parts  # beyond the one that each part gets
        ends = [i + round(spare * sum(shares[:i]) / sum(shares)) for i in range(parts)]
        order = permutation(n, seed, 0, 0x5711)  # another key than those of the epochs
        room = [b - a for a, b in pairwise(ends)]
        return [
            self.take([i for c in part for i in range(starts[c], starts[c + 1])])
            for part in fill_splits(order.tolist(), room)
        ]

    def _conversations(self) -> list[int]:
        """Start of each run of examples with the same name, followed by the number of examples."""
        names = pa.chunked_array([view.names for view in self._views], pa.string())
        names = names.take(pa.array(self._chosen))
        new = pc.not_equal(names[1:], names[:-1]).to_numpy().astype(bool)
        return [0, *(np.flatnonzero(new) + 1).tolist(), len(names)][: len(names) + 1]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Example:  # type: ignore[override]
        if not 0 <= number < len(self):  # ends the iteration of a Sequence, too
            raise IndexError(f"example {number} of {len(self)}")
        at = int(self._chosen[number])
        which = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self._views[which].example(at - int(self._starts[which]))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def targets(self) -> int:
        return int(self.target_lengths.sum())


class _View(NamedTuple):
    """The arrays of a record batch, without a copy."""

    offsets: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    names: pa.StringArray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _View:
        ids, labels = batch.column("input_ids"), batch.column("labels")
        return cls(
            ids.offsets.to_numpy(),
            ids.values.to_numpy(),
            labels.values.to_numpy(),
            batch.column("scored").to_numpy(),
            batch.column("name"),
        )

    def example(self, at: int) -> Example:
        here = slice(int(self.offsets[at]), int(self.offsets[at + 1]))
        return Example(self.ids[here], self.labels[here], self.names[at].as_py())


def _batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    """Record batches of about _TOKENS tokens."""
    waiting: list[Example] = []
    size = 0
    for example in examples:
        waiting.append(example)
        size += len(example.ids)
        if size >= _TOKENS:
            yield _batch(waiting)
            waiting, size = [], 0
    if waiting:
        yield _batch(waiting)


def _batch(examples: list[Example]) -> pa.RecordBatch:
    ids, labels, names = zip(*examples, strict=True)
    # The first token is never a target, whatever its label: nothing precedes it.
    scored = [int((row[1:] != IGNORE_INDEX).sum()) for row in labels]
    columns = {"input_ids": ids, "labels": labels, "scored": scored, "name": names}
    return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)


class _Totals:
    """Count and fingerprint of examples, independent of how they are divided into batches."""

    def __init__(self) -> None:
        self.examples = 0
        self.digests = [hashlib.sha256() for _ in range(3)]  # lengths, ids, labels

    def add(self, view: _View) -> None:
        self.examples += len(view.names)
        lengths = np.diff(view.offsets).astype("<i8")
        for digest, array in zip(self.digests, (lengths, view.ids, view.labels), strict=True):
            digest.update(array.tobytes())

    def summary(self) -> dict[str, Any]:
        whole = hashlib.sha256(b"".join(digest.digest() for digest in self.digests))
        return {"examples": self.examples, "fingerprint": whole.hexdigest()}


def _open(path: Path) -> tuple[list[pa.RecordBatch], dict[str, Any], dict[str, Any]]:
    """Record batches over the mapped file, the facts stored in it, and its totals."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_arrow(path, _SCHEMA, _OTHER)
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        count = reader.num_record_batches
        batches = [reader.get_batch(i) for i in range(count - 1)]
        metadata = (reader.schema.metadata or {}).get(_METADATA)
        last = reader.get_batch_with_custom_metadata(count - 1) if count else None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as an Arrow file ({error})") from None
    totals = last.custom_metadata if last is not None else None
    if metadata is None or totals is None or _TOTALS.encode() not in totals:
        raise ValueError(f"{path}: {_OTHER}")
    facts, summary = (
        files.check_mapping(files.parse_json(x, path), path) for x in (metadata, totals[_TOTALS])
    )
    return batches, facts | files.check_mapping(summary.get("metadata", {}), path), summary


def is_chat_set(path: Path) -> bool:
    """Whether `write_examples` made this file."""
    is_arrow = path.suffix.lower() == ".arrow" and path.is_file()
    return is_arrow and _METADATA in (read_schema(path).metadata or {})

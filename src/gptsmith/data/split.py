"""Deterministic training, validation and test splits.

Rows with equal keys form a group that stays in one split: a model must not be tested on what it was
trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Literal

from gptsmith.data.documents import Chunk, Document, Source
from gptsmith.data.options import PrepareConfig

# --- rows ----------------------------------------------------------------------------------------


def group_rows(keys: Iterable[str]) -> dict[str, list[int]]:
    """The indices of the rows with each key; keys in order of appearance."""
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups


def group_prompts(prompts: Iterable[str]) -> dict[str, list[int]]:
    """The indices of equal prompts; case and white space make no difference."""
    return group_rows(" ".join(prompt.casefold().split()) for prompt in prompts)


def hash_order(keys: Sequence[str], seed: int) -> list[int]:
    """The indices of the keys, ordered by a hash of seed and key.

    A key's hash does not depend on other keys, so most keys stay in their split when a file grows.
    """
    digests = [hashlib.sha256(f"{seed}\n{key}".encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)


def fill_splits(
    order: Iterable[int], room: Sequence[int], sizes: Sequence[int] | None = None
) -> list[list[int]]:
    """Assign groups to splits of limited room; a further split takes the rest.

    In the given order, each group goes to the first split that has room for all of it. sizes: of
    the groups (default: 1 each). Returns the sorted group indices of each split.
    """
    left = list(room)
    splits: list[list[int]] = [[] for _ in (*room, None)]
    for number in order:
        size = 1 if sizes is None else sizes[number]
        into = next((i for i, free in enumerate(left) if size <= free), len(left))
        if into < len(left):
            left[into] -= size
        splits[into].append(number)
    return [sorted(split) for split in splits]


def split_by_hash(
    groups: Mapping[str, Sequence[int]], room: Sequence[int], seed: int
) -> list[list[int]]:
    """Assign whole groups to splits by a hash of their keys: `room` groups to each, the others to a
    further one. Returns the sorted indices of the rows of each split."""
    members = list(groups.values())
    return [
        sorted(i for number in part for i in members[number])
        for part in fill_splits(hash_order(list(groups), seed), room)
    ]


# --- documents -----------------------------------------------------------------------------------

# "first_shard": to validation until its first shard is full, then to training.
Split = Literal["train", "val", "first_shard"]
SplitDocument = tuple[Split, Document]

_FEW = 100  # fewer documents than this are counted before they are divided
_HASHED = 1 << 16  # characters of a document that its hash depends on


class DocumentSplit:
    """The documents of a corpus with their splits; can be iterated more than once.

    A single document is split before its last characters. Of several, those with a low hash are for
    validation, so that reordering or adding documents never moves one to another split. Sources may
    have their own validation documents, or use their first shard. Validation documents that are
    known from the start come first.

    duplicates   documents skipped as exact copies, so far in this iteration
    rules        how validation documents are chosen, in words, so far in this iteration
    """

    def __init__(
        self,
        sources: Iterable[Source],
        val: Source | None,
        read: Callable[[Source], Iterator[Document]],
        config: PrepareConfig,
    ) -> None:
        """val: a source of validation documents; all `sources` are then for training."""
        self.sources, self.val, self.read = tuple(sources), val, read
        self.val_fraction, self.max_documents = config.val_fraction, config.max_documents
        self.deduplicate = config.deduplicate
        self.duplicates = 0
        self.rules: list[str] = []

    def __iter__(self) -> Iterator[SplitDocument]:
        self.duplicates = 0
        self.rules = []
        seen: set[bytes] = set()
        for document in self._validation():
            if self._is_new(document, seen):
                yield "val", document
        rest = islice(self._candidates(seen), self.max_documents)
        first = list(islice(rest, _FEW))
        if len(first) == _FEW:
            yield from self._by_hash(chain(first, rest))
        else:
            yield from self._few(first)

    def _rule(self, rule: str) -> None:
        if rule not in self.rules:
            self.rules.append(rule)

    def _validation(self) -> Iterator[Document]:
        if self.val is not None:
            remark = "" if self.deduplicate else overlap_remark(self.val, self.sources)
            self._rule(f"the documents of {self.val.used}{remark}")
            yield from self.read(self.val)
            return
        for source in self.sources:
            if source.validation is not None:
                self._rule(f"the validation split of {source.used}")
                yield from self.read(source.validation)

    def _candidates(self, seen: set[bytes]) -> Iterator[SplitDocument]:
        """Documents in reading order; "val" marks those that are yet to be split."""
        for source in self.sources:
            split: Split = "val"
            if self.val is not None or source.validation is not None:
                split = "train"
            elif source.first_shard:
                split = "first_shard"
                self._rule(f"the first shard of {source.used}")
            for document in self.read(source):
                if self._is_new(document, seen):
                    yield split, document

    def _is_new(self, document: Document, seen: set[bytes]) -> bool:
        if not self.deduplicate:
            return True
        digest = _digest(document.chunks)
        if digest in seen:
            self.duplicates += 1
            return False
        seen.add(digest)
        return True

    def _by_hash(self, documents: Iterable[SplitDocument]) -> Iterator[SplitDocument]:
        for split, document in documents:
            if split == "val":
                self._rule(hash_rule(self.val_fraction))
                split = _split_by_hash(document, self.val_fraction)
            yield split, document

    def _few(self, documents: list[SplitDocument]) -> Iterator[SplitDocument]:
        """Split few documents, which fit into memory, by an exact share of at least one."""
        undecided = [i for i, (split, _) in enumerate(documents) if split == "val"]
        val: list[int] = []
        if len(undecided) == 1:
            head, tail = self._cut(documents[undecided[0]][1])
            yield "val", tail
            documents[undecided[0]] = "train", head
        elif undecided:
            count = min(max(1, round(self.val_fraction * len(undecided))), len(undecided) - 1)
            self._rule(f"the {count} of {len(undecided)} documents with the lowest hash")
            val, _ = fill_splits(
                sorted(undecided, key=lambda i: (_hash(documents[i][1]), i)), [count]
            )
        yield from (documents[i] for i in val)
        for i, (split, document) in enumerate(documents):
            if i not in val:
                yield "train" if split == "val" else split, document

    def _cut(self, document: Document) -> tuple[Document, Document]:
        """Split a document into its training part and, at the end, its validation part."""
        total = sum(map(len, document.chunks))
        cut = int(total * (1 - self.val_fraction))
        unit = "characters" if isinstance(next(iter(document.chunks)), str) else "tokens"
        if not 0 < cut < total:
            raise ValueError(
                f"{document.place}: {total} {unit} leave nothing for training or nothing for "
                "validation; give more text, or --val FILE"
            )
        self._rule(f"the last {self.val_fraction:.4g} of one document's {unit}")
        tail = Document(document.place, _Slice(document.chunks, cut, total), delimited=False)
        return document._replace(chunks=_Slice(document.chunks, 0, cut)), tail


def overlap_remark(val: Source, sources: Sequence[Source]) -> str:
    """A remark if files of the validation source are also trained on, or ""."""
    if any(val.used == source.used for source in sources):
        return ", which are trained on too"
    train = {path.resolve() for source in sources for path in source.files}
    shared = [path for path in val.files if path.resolve() in train]
    return f", of whose files {len(shared)} are trained on too" if shared else ""


class PartSplit:
    """The documents of a part of a corpus with their splits; can be iterated more than once.

    split: of all documents; None: those with a low hash are for validation, as in DocumentSplit
    where there are many documents.
    """

    duplicates = 0  # a part does not know the documents of the others

    def __init__(
        self, read: Callable[[], Iterator[Document]], split: Split | None, val_fraction: float
    ) -> None:
        self.read, self.split, self.val_fraction = read, split, val_fraction
        self.rules: list[str] = []  # those of the corpus are known from the start

    def __iter__(self) -> Iterator[SplitDocument]:
        for document in self.read():
            yield self.split or _split_by_hash(document, self.val_fraction), document


def _split_by_hash(document: Document, val_fraction: float) -> Split:
    return "val" if _hash(document) < int(val_fraction * 2**64) else "train"


def hash_rule(val_fraction: float) -> str:
    return f"documents whose hash is among the lowest {val_fraction:.4g}"


class _Slice:
    """A range of a document's characters (or tokens), in chunks."""

    def __init__(self, chunks: Iterable[Chunk], start: int, stop: int) -> None:
        self.chunks, self.start, self.stop = chunks, start, stop

    def __iter__(self) -> Iterator[Chunk]:
        at = 0
        for chunk in self.chunks:
            if at >= self.stop:
                return
            part = chunk[max(0, self.start - at) : self.stop - at]
            at += len(chunk)
            if len(part):
                yield part


def _bytes(chunk: Chunk) -> bytes:
    return chunk.encode() if isinstance(chunk, str) else chunk.astype("<i8").tobytes()


def _digest(chunks: Iterable[Chunk]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(_bytes(chunk))
    return digest.digest()


def _hash(document: Document) -> int:
    """A 64-bit hash of the first characters of the document."""
    head: list[Chunk] = []
    missing = _HASHED
    for chunk in document.chunks:
        head.append(chunk[:missing])
        missing -= len(head[-1])
        if not missing:
            break
    return int.from_bytes(hashlib.blake2b(b"".join(map(_bytes, head)), digest_size=8).digest())

"""Which documents are taken, and which of them validate: the same answer at every reading.

One document validates on the last part of its characters. Of several, those whose hash is small
enough, so that neither their order nor a further document moves one to the other side. A source
that brings its own validation documents, or validates on its first shard, does that.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from gptsmith.data.documents import Chunk, Document, Source

# "first" goes to validation until its first shard is full, and from then on to training.
Split = Literal["train", "val", "first"]
Selected = tuple[Split, Document]

_FEW = 100  # up to here documents are counted before they are divided
_HASHED = 1 << 16  # characters of a document that decide its side


class Selection:
    """The documents of a corpus with their split, in one order, to be iterated more than once.

    Validation documents come first where they are known from the start. During an iteration
    `duplicates` counts the documents left out as exact copies, and `rules` says in words how
    validation is chosen.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        val: Source | None,
        read: Callable[[Source], Iterator[Document]],
        *,
        val_fraction: float,
        max_documents: int | None,
        deduplicate: bool,
    ) -> None:
        self.sources, self.val, self.read = tuple(sources), val, read
        self.val_fraction, self.max_documents = val_fraction, max_documents
        self.deduplicate = deduplicate
        self.duplicates = 0
        self.rules: list[str] = []

    def __iter__(self) -> Iterator[Selected]:
        self.duplicates = 0
        self.rules = []
        seen: set[bytes] = set()
        for document in self._validation():
            if self._is_new(document, seen):
                yield "val", document
        rest = islice(self._candidates(seen), self.max_documents)
        several = list(islice(rest, _FEW))
        if len(several) == _FEW:
            yield from self._by_hash(several, rest)
        else:
            yield from self._few(several)

    def _rule(self, rule: str) -> None:
        if rule not in self.rules:
            self.rules.append(rule)

    def _validation(self) -> Iterator[Document]:
        if self.val is not None:
            self._rule(f"the documents of {self.val.used}{self._shared(self.val)}")
            yield from self.read(self.val)
            return
        for source in self.sources:
            if source.validation is not None:
                self._rule(f"the validation split of {source.used}")
                yield from source.validation()

    def _shared(self, val: Source) -> str:
        """What is in training too, in words: it makes validation look better than it is."""
        if self.deduplicate:
            return ""
        if any(val.used == source.used for source in self.sources):
            return ", which are trained on too"
        ours = {_same(path) for source in self.sources for path in source.files}
        shared = [path for path in val.files if _same(path) in ours]
        return f", of whose files {len(shared)} are trained on too" if shared else ""

    def _candidates(self, seen: set[bytes]) -> Iterator[Selected]:
        """Documents in reading order; "val" means here: to be divided."""
        for source in self.sources:
            split: Split = "val"
            if self.val is not None or source.validation is not None:
                split = "train"
            elif source.first_shard:
                split = "first"
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

    def _by_hash(self, first: list[Selected], rest: Iterator[Selected]) -> Iterator[Selected]:
        limit = int(self.val_fraction * 2**64)
        for split, document in chain(first, rest):
            if split == "val":
                self._rule(f"documents whose hash is among the lowest {self.val_fraction:.4g}")
                split = "val" if _order(document) < limit else "train"
            yield split, document

    def _few(self, selected: list[Selected]) -> Iterator[Selected]:
        """Of so few documents that are all at hand, an exact share, and at least one."""
        divided = [document for split, document in selected if split == "val"]
        if len(divided) == 1:
            (document,) = divided
            total = sum(map(len, document.chunks))
            cut = int(total * (1 - self.val_fraction))
            unit = "tokens" if document.begins is False else "characters"
            if not 0 < cut < total:
                raise ValueError(
                    f"{document.place}: {total} {unit} leave nothing for training or nothing for "
                    "validation; give more text, or --val FILE"
                )
            self._rule(f"the last {self.val_fraction:.4g} of one document's {unit}")
            yield "val", Document(document.place, _Part(document.chunks, cut, total), begins=False)
            head = document._replace(chunks=_Part(document.chunks, 0, cut))
            selected = [("train", head) if s == "val" else (s, d) for s, d in selected]
        elif divided:
            count = min(max(1, round(self.val_fraction * len(divided))), len(divided) - 1)
            low = sorted(range(len(divided)), key=lambda i: (_order(divided[i]), i))[:count]
            self._rule(f"the {count} of {len(divided)} documents with the lowest hash")
            yield from (("val", divided[i]) for i in sorted(low))
            chosen = {id(divided[i]) for i in low}
            selected = [
                ("train" if s == "val" else s, d) for s, d in selected if id(d) not in chosen
            ]
        yield from selected


def _same(path: Path) -> tuple[int, int]:
    """What two names of one file have in common."""
    status = path.stat()
    return status.st_dev, status.st_ino


class _Part:
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


def _order(document: Document) -> int:
    """A number below 2**64 that depends on the document's (beginning of the) text alone."""
    head: list[Chunk] = []
    missing = _HASHED
    for chunk in document.chunks:
        head.append(chunk[:missing])
        missing -= len(head[-1])
        if not missing:
            break
    return int.from_bytes(hashlib.blake2b(b"".join(map(_bytes, head)), digest_size=8).digest())

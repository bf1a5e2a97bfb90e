"""What a prepared corpus holds, counted in one pass and in bounded memory (12 bytes a document)."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from gptsmith.data.shards import SPLITS, Corpus
from gptsmith.tokenizer import Tokenizer

_PIECE = 1 << 22  # tokens at a time: np.bincount widens them to 8 bytes each


@dataclass(frozen=True)
class SplitStatistics:
    """counts (V,) occurrences of each id; lengths (documents,) in tokens without <|endoftext|>;
    digests (documents,) 64-bit hashes of the documents' tokens; text_bytes of UTF-8."""

    name: str
    shards: int
    tokens: int
    text_bytes: int
    counts: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def duplicates(self) -> int:
        """Documents that say, token for token, what an earlier one says."""
        return self.documents - len(np.unique(self.digests))


@dataclass(frozen=True)
class Sample:
    """A training pair: y is x one token further on. `start` counts from the shard's first token."""

    place: str
    start: int
    x: list[int]
    y: list[int]


@dataclass(frozen=True)
class CorpusReport:
    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, SplitStatistics]
    samples: list[Sample]

    @cached_property
    def counts(self) -> np.ndarray:
        """Occurrences of each id in all splits, (V,)."""
        return np.sum([split.counts for split in self.splits.values()], axis=0)

    def top(self, n: int) -> list[tuple[int, int]]:
        """The n most frequent (id, occurrences), special tokens left out."""
        counts = self.counts.copy()
        counts[list(self.tokenizer.special_tokens.values())] = 0
        order = np.argsort(-counts, kind="stable")[:n]
        return [(int(i), int(counts[i])) for i in order if counts[i]]

    @property
    def used(self) -> int:
        """Ids that occur at all."""
        return int(np.count_nonzero(self.counts))

    def needed(self, share: float) -> int:
        """How many ids, taken by frequency, make up this share of all tokens."""
        running = np.cumsum(np.sort(self.counts)[::-1])
        return int(np.searchsorted(running, share * running[-1])) + 1

    @property
    def unseen(self) -> float:
        """Share of the validation tokens whose id never occurs in training."""
        train, val = self.splits["train"].counts, self.splits["val"].counts
        return float(val[train == 0].sum() / max(1, val.sum()))

    @property
    def leaked(self) -> int:
        """Validation documents that are, token for token, training documents too."""
        return int(np.isin(self.splits["val"].digests, self.splits["train"].digests).sum())


def corpus_report(
    path: str | Path, *, samples: int = 2, context: int = 32, console: Console | None = None
) -> CorpusReport:
    """Everything `gptsmith inspect` tells of a corpus; reads all of it, with a bar on `console`.

    samples: training pairs of `context` tokens, at evenly spaced places. ValueError for a damaged
    corpus and for ids that its tokenizer does not have.
    """
    corpus = Corpus.open(path)
    tokenizer = corpus.tokenizer
    splits = {}
    for name in SPLITS:
        shards = corpus.train if name == "train" else corpus.val
        splits[name] = _count(corpus, name, shards, console)
    return CorpusReport(
        path=corpus.path,
        manifest=corpus.manifest,
        tokenizer=tokenizer,
        splits=splits,
        samples=_samples(corpus, samples, context),
    )


def _count(
    corpus: Corpus, name: str, shards: Sequence[np.ndarray], console: Console | None
) -> SplitStatistics:
    tokenizer = corpus.tokenizer
    V = tokenizer.vocab_size
    counts, documents = np.zeros(V, np.int64), _Documents(tokenizer.eos_id)
    pieces = [
        (shard, i) for shard in range(len(shards)) for i in range(0, len(shards[shard]), _PIECE)
    ]
    shown = console is not None and console.is_terminal
    for shard, start in track(
        pieces, f"reading {name}", console=console, transient=True, disable=not shown
    ):
        ids = np.asarray(shards[shard][start : start + _PIECE])
        found = np.bincount(ids, minlength=V)
        if len(found) > V:
            file = corpus.manifest["splits"][name]["shards"][shard]["file"]
            raise ValueError(
                f"{corpus.path / file}: holds token id {len(found) - 1}, but its tokenizer ends at "
                f"{V - 1}; prepare the corpus again"
            )
        counts += found
        documents.add(ids)
    documents.close()
    return SplitStatistics(
        name=name,
        shards=len(shards),
        tokens=sum(map(len, shards)),
        text_bytes=int(counts @ tokenizer.token_bytes().astype(np.int64)),
        counts=counts,
        lengths=np.array(documents.lengths, np.int64),
        digests=np.array(documents.digests, np.uint64),
    )


class _Documents:
    """Lengths and hashes of the documents in a stream that comes in pieces.

    A document begins at <|endoftext|>; one without it may stand at the beginning of the stream.
    """

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id
        self.lengths, self.digests = array("Q"), array("Q")
        self._length, self._open = 0, False
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, ids: np.ndarray) -> None:
        borders = np.flatnonzero(ids == self.eos_id).tolist()
        start = 0
        for border in borders:
            self._extend(ids[start:border])
            self.close()
            self._open, start = True, border + 1
        self._extend(ids[start:])

    def _extend(self, ids: np.ndarray) -> None:
        if len(ids):
            self._open = True
            self._length += len(ids)
            self._hash.update(np.ascontiguousarray(ids).data)

    def close(self) -> None:
        """The document that is open, if any, ends here."""
        if self._open:
            self.lengths.append(self._length)
            self.digests.append(int.from_bytes(self._hash.digest(), "little"))
            self._length, self._open = 0, False
            self._hash = hashlib.blake2b(digest_size=8)


def _samples(corpus: Corpus, number: int, context: int) -> list[Sample]:
    ends = np.cumsum([len(shard) for shard in corpus.train])
    samples = []
    for i in range(number if len(ends) else 0):
        at = (2 * i + 1) * int(ends[-1]) // (2 * number)
        number_of_shard = int(np.searchsorted(ends, at, side="right"))
        shard = corpus.train[number_of_shard]
        start = at - (int(ends[number_of_shard]) - len(shard))
        start = max(0, min(start, len(shard) - context - 1))
        window = shard[start : start + context + 1].tolist()
        place = corpus.manifest["splits"]["train"]["shards"][number_of_shard]["file"]
        samples.append(Sample(place, start, window[:-1], window[1:]))
    return samples

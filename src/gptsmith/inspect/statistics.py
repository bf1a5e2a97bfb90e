"""Statistics of a prepared corpus, in one pass and 16 bytes of memory per document."""

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.data.shards import SPLITS, Corpus
from gptsmith.progress import progress
from gptsmith.tokenizer import DocumentTokens, Tokenizer

_CHUNK = 1 << 22  # tokens at a time: np.bincount widens them to 8 bytes each


@dataclass(frozen=True)
class SplitStatistics:
    """Sizes and counts of one split.

    counts (V,): occurrences of each id. lengths (documents,): in tokens, without <|endoftext|>.
    digests (documents,): 64-bit hashes of the documents' tokens. text_bytes: of UTF-8.
    """

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
        """Documents whose tokens are exactly those of an earlier one."""
        return self.documents - len(np.unique(self.digests))


@dataclass(frozen=True)
class TrainingPair:
    """Inputs x and targets y, which are x one token later. `start` counts from the first token of
    the shard called `file`."""

    file: str
    start: int
    x: list[int]
    y: list[int]


@dataclass(frozen=True)
class CorpusReport:
    """What `gptsmith inspect` shows of a corpus."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, SplitStatistics]
    pairs: list[TrainingPair]

    @cached_property
    def counts(self) -> np.ndarray:
        """Occurrences of each id in all splits, (V,)."""
        return np.sum([split.counts for split in self.splits.values()], axis=0)

    def most_frequent(self, n: int) -> list[tuple[int, int]]:
        """The n most frequent (id, occurrences), special tokens excluded."""
        counts = self.counts.copy()
        counts[list(self.tokenizer.special_tokens.values())] = 0
        order = np.argsort(-counts, kind="stable")[:n]
        return [(int(i), int(counts[i])) for i in order if counts[i]]

    @property
    def used_ids(self) -> int:
        """How many ids occur at least once."""
        return int(np.count_nonzero(self.counts))

    def ids_covering(self, share: float) -> int:
        """How many of the most frequent ids make up this share of all tokens."""
        running = np.cumsum(np.sort(self.counts)[::-1])
        return int(np.searchsorted(running, share * running[-1])) + 1

    @property
    def unseen_share(self) -> float:
        """Share of the validation tokens whose id never occurs in training."""
        train, val = self.splits["train"].counts, self.splits["val"].counts
        return float(val[train == 0].sum() / max(1, val.sum()))

    @property
    def contaminated(self) -> int:
        """Validation documents that also occur in the training split, token for token."""
        return int(np.isin(self.splits["val"].digests, self.splits["train"].digests).sum())


def corpus_report(path: str | Path, *, pairs: int = 2, context: int = 32) -> CorpusReport:
    """The statistics of the corpus at `path`; reads all of it, and reports progress.

    pairs: training pairs of `context` tokens, at evenly spaced places. ValueError for a damaged
    corpus.
    """
    corpus = Corpus.open(path)
    return CorpusReport(
        path=corpus.path,
        manifest=corpus.manifest,
        tokenizer=corpus.tokenizer,
        splits={name: _count(corpus, name) for name in SPLITS},
        pairs=_training_pairs(corpus, pairs, context),
    )


def _count(corpus: Corpus, name: str) -> SplitStatistics:
    shards = corpus.train if name == "train" else corpus.val
    V = corpus.tokenizer.vocab_size
    counts, documents = np.zeros(V, np.int64), _Documents(corpus.document)
    chunks = [
        (n, start) for n, size in enumerate(shards.lengths) for start in range(0, size, _CHUNK)
    ]
    for n, start in progress(chunks, f"reading {name}", len(chunks)):
        ids = np.asarray(shards[n][start : start + _CHUNK])
        counts += np.bincount(ids, minlength=V)
        documents.add(ids)
    documents.end()
    return SplitStatistics(
        name=name,
        shards=len(shards),
        tokens=sum(shards.lengths),
        text_bytes=int(corpus.manifest["splits"][name]["bytes"]),
        counts=counts,
        lengths=np.array(documents.lengths, np.int64),
        digests=np.array(documents.digests, np.uint64),
    )


class _Documents:
    """Lengths and hashes of the documents in a stream of tokens that arrives in chunks.

    Documents are what is between document tokens; the first of a stream may begin without one.
    """

    def __init__(self, document_tokens: DocumentTokens) -> None:
        self.borders = np.array([*document_tokens.before, *document_tokens.after], np.int64)
        self.first = document_tokens.before[-1] if document_tokens.before else None
        self.lengths, self.digests = array("Q"), array("Q")
        self._reset()

    def _reset(self) -> None:
        self._length, self._open = 0, False
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, ids: np.ndarray) -> None:
        start = 0
        for border in np.flatnonzero(np.isin(ids, self.borders)).tolist():
            self._extend(ids[start:border])
            self.end()
            self._open, start = bool(ids[border] == self.first), border + 1
        self._extend(ids[start:])

    def _extend(self, ids: np.ndarray) -> None:
        if len(ids):
            self._open = True
            self._length += len(ids)
            self._hash.update(np.ascontiguousarray(ids).data)

    def end(self) -> None:
        """End the current document, if there is one."""
        if self._open:
            self.lengths.append(self._length)
            self.digests.append(int.from_bytes(self._hash.digest(), "little"))
            self._reset()


def _training_pairs(corpus: Corpus, count: int, context: int) -> list[TrainingPair]:
    """`count` pairs at evenly spaced places of the training tokens."""
    ends = np.cumsum(corpus.train.lengths)
    pairs = []
    for i in range(count if len(ends) else 0):
        at = (2 * i + 1) * int(ends[-1]) // (2 * count)
        n = int(np.searchsorted(ends, at, side="right"))
        shard = corpus.train[n]
        start = at - (int(ends[n]) - len(shard))
        start = max(0, min(start, len(shard) - context - 1))
        ids = shard[start : start + context + 1].tolist()
        file = corpus.manifest["splits"]["train"]["shards"][n]["file"]
        pairs.append(TrainingPair(file, start, ids[:-1], ids[1:]))
    return pairs

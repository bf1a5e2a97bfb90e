"""Encode documents in batches of about a megabyte of text, on all cores, in order.

A batch's ids depend on its text alone and batches come back in order, so neither the number of
threads nor an interruption changes a byte of the corpus.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from gptsmith.data.documents import Chunk
from gptsmith.data.split import Split, SplitDocument
from gptsmith.tokenizer import Tokenizer

T = TypeVar("T")

BATCH_SIZE = 1 << 20  # characters, or tokens where the source holds tokens


class DocumentChunk(NamedTuple):
    """A chunk of a document, to be encoded.

    first      whether it is the first chunk of the document
    delimited  whether document tokens go around it
    place      place of the document, for messages
    """

    split: Split
    content: Chunk
    first: bool
    delimited: bool
    place: str


@dataclass(frozen=True)
class TextBatch:
    """Consecutive chunks. left_out: documents skipped since the start, by reason."""

    chunks: list[DocumentChunk]
    left_out: dict[str, int]


Encoded = list[tuple[np.ndarray, int]]
"""For each chunk: its ids, without document tokens, and the number of UTF-8 bytes of its text."""


def make_batches(
    documents: Iterable[SplitDocument], *, whole: bool, left_out: Callable[[], dict[str, int]]
) -> Iterator[TextBatch]:
    """Group the documents into batches.

    whole: join the chunks of each document, for tokenizers that might encode chunks differently,
    or if a token follows each document. left_out: returns the documents skipped so far.
    """
    chunks: list[DocumentChunk] = []
    sizes = dict.fromkeys(("train", "val"), 0)
    for split, document in documents:
        contents = document.chunks
        if whole or split == "first_shard":
            contents = [_join(contents)]
        for number, content in enumerate(contents):
            first = number == 0
            chunks.append(
                DocumentChunk(split, content, first, first and document.delimited, document.place)
            )
            sizes["val" if split == "val" else "train"] += len(content)
            # Validation text alone fills a batch only where all of it comes first. A limit on
            # training tokens then stops validation at about the same document.
            if (sizes["train"] or sizes["val"]) >= BATCH_SIZE:
                yield TextBatch(chunks, left_out())
                chunks, sizes = [], dict.fromkeys(sizes, 0)
    if chunks:
        yield TextBatch(chunks, left_out())


def _join(chunks: Iterable[Chunk]) -> Chunk:
    parts = list(chunks)
    return "".join(map(str, parts)) if isinstance(parts[0], str) else np.concatenate(parts)


def encode(batch: TextBatch, tokenizer: Tokenizer, token_bytes: np.ndarray | None) -> Encoded:
    """Encode a batch. ValueError naming the place of a text that the tokenizer cannot encode."""
    texts = [
        (chunk.place, chunk.content) for chunk in batch.chunks if isinstance(chunk.content, str)
    ]
    arrays = iter(encode_at(texts, tokenizer.encode_arrays))
    encoded: Encoded = []
    for chunk in batch.chunks:
        content = chunk.content
        if isinstance(content, str):
            encoded.append((next(arrays), len(content.encode())))
        else:
            ids = content.astype(tokenizer.dtype)
            if token_bytes is None:  # measured by decoding, as there is no text
                encoded.append((ids, len(tokenizer.decode(ids).encode())))
            else:
                encoded.append((ids, int(token_bytes[ids].sum(dtype=np.int64))))
    return encoded


def encode_at(texts: Sequence[tuple[str, str]], encode: Callable[[Sequence[str]], T]) -> T:
    """Encode (place, text) pairs. ValueError naming the place of the first text that fails."""
    try:
        return encode([text for _, text in texts])
    except ValueError:
        for place, text in texts:
            try:
                encode([text])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        raise


def encode_in_order(
    batches: Iterable[TextBatch],
    encode_one: Callable[[TextBatch], Encoded],
    threads: int,
) -> Generator[tuple[TextBatch, Encoded]]:
    """Batches with their ids, in order, a few at a time.

    It uses threads, because the encoder releases the interpreter lock (56 MB/s of English text on
    two cores); processes would only add copies and start-up time.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[tuple[TextBatch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, pool.submit(encode_one, batch)))
            if len(pending) > 2 * threads:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        while pending:
            oldest, future = pending.popleft()
            yield oldest, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

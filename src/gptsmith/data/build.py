"""Selected documents to token shards: encoded on all cores, written in order, safe to kill.

Work is cut into frames of about a megabyte of text. A frame's tokens depend on its text alone and
frames are written in order, so neither the number of threads nor a kill changes a byte of the
result. The journal says how many frames the files hold; going on means to cut the files back to
that, to read the source up to that frame without encoding it, and to continue.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith import files
from gptsmith.data.destination import JOURNAL, Identity
from gptsmith.data.documents import Chunk
from gptsmith.data.selection import Selected, Split
from gptsmith.data.shards import SPLITS, ShardWriter
from gptsmith.tokenizer import Tokenizer

_JOURNAL_SECONDS = 5.0
FRAME = 1 << 20  # characters, or tokens where the source holds tokens


@dataclass
class Frame:
    """Consecutive chunks of one split."""

    split: Split
    chunks: list[Chunk] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)  # <|endoftext|> goes before this chunk
    places: list[str] = field(default_factory=list)
    documents: int = 0  # that begin here
    size: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # up to here, since the beginning


def cut_frames(
    selected: Iterable[Selected], *, whole: bool, left_out: Callable[[], dict[str, int]]
) -> Iterator[Frame]:
    """Frames in the order in which they are to be written.

    whole: a document's chunks must be joined, because the tokenizer is not known to give the same
    ids for chunks. A validation frame comes before the training frame that was filled meanwhile,
    so that a limit on training tokens stops both at about the same document.
    """
    filling: dict[Split, Frame] = {}

    def take(split: Split) -> Iterator[Frame]:
        if frame := filling.pop(split, None):
            frame.left_out = left_out()
            yield frame

    for split, document in selected:
        chunks: Iterable[Chunk] = document.chunks
        if whole or split == "first":
            chunks = _joined(chunks)
        for number, chunk in enumerate(chunks):
            frame = filling.setdefault(split, Frame(split))
            frame.chunks.append(chunk)
            frame.begins.append(document.begins and number == 0)
            frame.places.append(document.place)
            frame.documents += number == 0
            frame.size += len(chunk)
            if frame.size >= FRAME:
                if split != "val":
                    yield from take("val")
                yield from take(split)
    for split in ("val", "first", "train"):
        yield from take(split)


def _joined(chunks: Iterable[Chunk]) -> list[Chunk]:
    parts = list(chunks)
    if isinstance(parts[0], str):
        return ["".join(map(str, parts))]
    return [np.concatenate(parts)]


@dataclass
class Encoded:
    """The tokens of a frame; `ends` and `text_bytes` go chunk by chunk."""

    ids: np.ndarray
    ends: list[int]
    text_bytes: list[int]


def encode(frame: Frame, tokenizer: Tokenizer, token_bytes: np.ndarray) -> Encoded:
    """ValueError naming the place of a text that the tokenizer cannot encode."""
    texts = [chunk for chunk in frame.chunks if isinstance(chunk, str)]
    try:
        arrays = tokenizer.encode_arrays(texts) if texts else []
    except ValueError:
        for place, chunk in zip(frame.places, frame.chunks, strict=True):
            try:
                tokenizer.encode_arrays([str(chunk)])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        raise
    encoded = iter(arrays)
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    parts: list[np.ndarray] = []
    ends, text_bytes, total = [], [], 0
    for chunk, begins in zip(frame.chunks, frame.begins, strict=True):
        if isinstance(chunk, str):
            ids = next(encoded)
            text_bytes.append(len(chunk) if chunk.isascii() else len(chunk.encode()))
        else:
            ids = chunk.astype(tokenizer.dtype)
            text_bytes.append(int(token_bytes[ids].sum(dtype=np.int64)))
        parts += [eos, ids] if begins else [ids]
        total += len(ids) + begins
        ends.append(total)
    return Encoded(np.concatenate(parts), ends, text_bytes)


def encode_in_order(
    frames: Iterable[Frame], encode_one: Callable[[Frame], Encoded], threads: int
) -> Generator[tuple[Frame, Encoded]]:
    """Frames with their tokens, in their order, a few in flight.

    Threads, because the encoder spends its time outside the interpreter's lock: on two cores 56
    MB/s of English with threads, and worker processes would only add copies and start-up.
    """
    pool = ThreadPoolExecutor(threads)
    flying: deque[tuple[Frame, Future[Encoded]]] = deque()
    try:
        for frame in frames:
            flying.append((frame, pool.submit(encode_one, frame)))
            if len(flying) > 2 * threads:
                first, future = flying.popleft()
                yield first, future.result()
        while flying:
            first, future = flying.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Build:
    """The shards of a corpus being made, and the journal beside them.

    frames, left_out   of what has been written
    full               the limit on training tokens is reached
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        token_bytes: np.ndarray,
        *,
        shard_tokens: int,
        max_tokens: int | None,
        identity: Identity,
        state: dict[str, Any] | None,
    ) -> None:
        self.folder, self.identity, self.token_bytes = folder, identity, token_bytes
        self.eos_id, self.shard_tokens, self.max_tokens = tokenizer.eos_id, shard_tokens, max_tokens
        state = state or {}
        self.frames: int = state.get("frames", 0)
        self.left_out: dict[str, int] = state.get("left_out", {})
        self.first_closed: bool = state.get("first_closed", False)
        self.writers = {
            split: ShardWriter(
                folder,
                split,
                tokenizer.dtype,
                shard_tokens,
                *state.get("splits", {}).get(split, ()),
            )
            for split in SPLITS
        }
        self._journaled = time.monotonic()

    @property
    def full(self) -> bool:
        return self.max_tokens is not None and self.tokens("train") >= self.max_tokens

    def tokens(self, split: str) -> int:
        return self.writers[split].tokens

    @property
    def totals(self) -> tuple[int, int]:
        """Text bytes and tokens of both splits."""
        records = [writer.record for writer in self.writers.values()]
        return sum(r["bytes"] for r in records), sum(r["tokens"] for r in records)

    def write(self, frame: Frame, encoded: Encoded) -> None:
        """Append a frame, and bring the journal up to date when a shard is full or time is up."""
        shards = self._shards()
        if frame.split == "first":
            self._write_first(frame, encoded)
        else:
            self._append(frame.split, encoded.ids, frame.documents, sum(encoded.text_bytes))
        self.frames += 1
        self.left_out = frame.left_out
        late = time.monotonic() - self._journaled > _JOURNAL_SECONDS
        if late or self._shards() > shards:
            self.journal()

    def journal(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        splits = {split: (writer.record, writer.partial) for split, writer in self.writers.items()}
        state = {
            "frames": self.frames,
            "left_out": self.left_out,
            "first_closed": self.first_closed,
            "splits": splits,
        }
        files.write_json(self.folder / JOURNAL, {**self.identity, "state": state})
        self._journaled = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Finish the last shards; what the manifest says of the splits."""
        for writer in self.writers.values():
            writer.finish()
        return {split: writer.record for split, writer in self.writers.items()}

    def close(self) -> None:
        """Let go of the files, as they are."""
        for writer in self.writers.values():
            writer.close()

    def _shards(self) -> int:
        return sum(len(writer.record["shards"]) for writer in self.writers.values())

    def _write_first(self, frame: Frame, encoded: Encoded) -> None:
        """Whole documents to validation until the next would overfill its first shard."""
        count, end = 0, 0
        while not self.first_closed and count < len(encoded.ends):
            if self.tokens("val") + encoded.ends[count] > self.shard_tokens:
                self.first_closed = True
            else:
                end = encoded.ends[count]
                count += 1
        if count:
            self._append("val", encoded.ids[:end], count, sum(encoded.text_bytes[:count]))
        if count < frame.documents:
            rest = sum(encoded.text_bytes[count:])
            self._append("train", encoded.ids[end:], frame.documents - count, rest)

    def _append(self, split: str, ids: np.ndarray, documents: int, text_bytes: int) -> None:
        if split == "train" and self.max_tokens is not None:
            room = self.max_tokens - self.tokens("train")
            if room < len(ids):
                ids = ids[:room]
                documents = min(documents, int(np.count_nonzero(ids == self.eos_id)))
                text_bytes = int(self.token_bytes[ids].sum(dtype=np.int64))
        self.writers[split].append(ids, documents=documents, text_bytes=text_bytes)


def cores() -> int:
    """Of this process, not of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

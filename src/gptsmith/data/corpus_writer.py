"""Writes encoded batches to the shards of an unfinished corpus, and its journal.

Every few seconds the journal records how many batches the shards hold. A writer created from the
journal's state truncates the shards to these batches.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptsmith.data import output_dir
from gptsmith.data.encode import Encoded, TextBatch
from gptsmith.data.options import PrepareConfig
from gptsmith.data.output_dir import Identity
from gptsmith.data.shards import SPLITS, UNFINISHED, ShardWriter
from gptsmith.tokenizer import Tokenizer

_JOURNAL_SECONDS = 5.0  # the most work that a kill can lose


@dataclass
class _Addition:
    """What a batch adds to a split."""

    ids: list[np.ndarray] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0


class CorpusWriter:
    """The shards of an unfinished corpus, and its journal.

    batches    written so far
    left_out   documents skipped so far, by reason
    """

    def __init__(
        self,
        config: PrepareConfig,
        tokenizer: Tokenizer,
        identity: Identity,
        state: dict[str, Any] | None = None,
    ) -> None:
        """state: of the journal. ValueError or FileNotFoundError if shards do not agree with it."""
        self.out, self.tokenizer, self.identity = config.out, tokenizer, identity
        self.shard_tokens, self.max_tokens = config.shard_tokens, config.max_tokens
        self.token_bytes = tokenizer.token_bytes()
        state = state or {"batches": 0, "left_out": {}, "first_shard_full": False, "splits": {}}
        self.batches: int = state["batches"]
        self.left_out: dict[str, int] = state["left_out"]
        self.first_shard_full: bool = state["first_shard_full"]
        self.writers = {
            split: ShardWriter(
                config.out / UNFINISHED,
                split,
                tokenizer.dtype,
                config.shard_tokens,
                state["splits"].get(split),
            )
            for split in SPLITS
        }
        assert tokenizer.eos_id is not None  # raises if documents would not end
        self._document = tokenizer.special_ids.document
        self._around = [
            np.array(ids, tokenizer.dtype) for ids in (self._document.before, self._document.after)
        ]
        self._journalled = time.monotonic()

    @property
    def full(self) -> bool:
        """Whether the limit on training tokens is reached."""
        return self.max_tokens is not None and self.tokens("train") >= self.max_tokens

    def tokens(self, split: str) -> int:
        return self.writers[split].tokens

    @property
    def totals(self) -> tuple[int, int]:
        """Text bytes and tokens of both splits."""
        records = [writer.record for writer in self.writers.values()]
        return sum(r["bytes"] for r in records), sum(r["tokens"] for r in records)

    def write(self, batch: TextBatch, encoded: Encoded) -> None:
        """Append a batch; every few seconds, update the journal."""
        for split, addition in self._divide(batch, encoded).items():
            if addition.ids:
                self._append(split, addition)
        self.batches += 1
        self.left_out = batch.left_out
        if time.monotonic() - self._journalled > _JOURNAL_SECONDS:
            self.journal()

    def journal(self) -> None:
        """Make durable what was written, and record it."""
        for writer in self.writers.values():
            writer.sync()
        state = {
            "batches": self.batches,
            "left_out": self.left_out,
            "first_shard_full": self.first_shard_full,
            "splits": {split: writer.record for split, writer in self.writers.items()},
        }
        output_dir.write_journal(self.out, self.identity, state)
        self._journalled = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Complete the last shards; the manifest's entries of the splits."""
        for writer in self.writers.values():
            writer.finish()
        return {split: writer.record for split, writer in self.writers.items()}

    def close(self) -> None:
        """Close the files without completing the last shards."""
        for writer in self.writers.values():
            writer.close()

    def _divide(self, batch: TextBatch, encoded: Encoded) -> dict[str, _Addition]:
        """What each split gets. Documents of "first_shard" go to validation, whole, until the next
        would not fit into its first shard."""
        additions = {split: _Addition() for split in SPLITS}
        val_tokens = self.tokens("val")
        for part, ids, text_bytes in zip(batch.parts, *encoded, strict=True):
            split: str = part.split
            before, after = self._around
            size = len(ids) + (len(before) + len(after)) * part.begins
            if split == "first_shard":
                self.first_shard_full |= val_tokens + size > self.shard_tokens
                split = "train" if self.first_shard_full else "val"
            if split == "val":
                val_tokens += size
            addition = additions[split]
            addition.ids += [before, ids, after] if part.begins else [ids]
            addition.documents += part.first
            addition.text_bytes += text_bytes
        return additions

    def _append(self, split: str, addition: _Addition) -> None:
        ids = np.concatenate(addition.ids)
        documents, text_bytes = addition.documents, addition.text_bytes
        if split == "train" and self.max_tokens is not None:
            room = self.max_tokens - self.tokens("train")
            if room < len(ids):
                whole, ids = len(ids), ids[:room]
                starts = int(np.count_nonzero(self._document.starts(ids)))
                documents = min(documents, starts + (not self._document.before))
                if self.token_bytes is None:
                    text_bytes = text_bytes * room // whole
                else:
                    text_bytes = int(self.token_bytes[ids].sum(dtype=np.int64))
        self.writers[split].append(ids, documents=documents, text_bytes=text_bytes)

"""Write encoded batches to the shards of an unfinished corpus, and keep its journal.

Every few seconds the journal records how many batches the shards contain. A writer created from the
journal's state truncates the shards to these batches.
"""

import time
from typing import Any

import numpy as np

from gptsmith.data import output_dir
from gptsmith.data.encode import Encoded, TextBatch
from gptsmith.data.options import PrepareConfig
from gptsmith.data.output_dir import Identity
from gptsmith.data.shards import SPLITS, UNFINISHED, ShardWriter
from gptsmith.tokenizer import Tokenizer

_JOURNAL_SECONDS = 5.0  # the most work that a kill can lose


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
        part: int | None = None,
    ) -> None:
        """state: of the journal. ValueError or FileNotFoundError if shards do not agree with it.

        part: number of the part of a corpus, which is in the names of its shards.
        """
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
                split if part is None else f"{split}-{part:05d}",
                tokenizer.dtype,
                config.shard_tokens,
                state["splits"].get(split),
            )
            for split in SPLITS
        }
        self._document = tokenizer.special_ids.document
        self._journalled = time.monotonic()

    @property
    def full(self) -> bool:
        """Whether the limit on training tokens is reached."""
        return self.max_tokens is not None and self.tokens("train") >= self.max_tokens

    def tokens(self, split: str) -> int:
        return self.writers[split].tokens

    @property
    def _records(self) -> dict[str, Any]:
        return {split: writer.record for split, writer in self.writers.items()}

    @property
    def totals(self) -> tuple[int, int]:
        """Text bytes and tokens of both splits."""
        records = self._records.values()
        return sum(r["bytes"] for r in records), sum(r["tokens"] for r in records)

    def write(self, batch: TextBatch, encoded: Encoded) -> None:
        """Append a batch; every few seconds, update the journal.

        Documents of the split "first_shard" go to validation until one does not fit into its first
        shard, and from then on to training.
        """
        added: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        documents, text_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        val_tokens = self.tokens("val")
        for chunk, (ids, size) in zip(batch.chunks, encoded, strict=True):
            whole = self._document.around(ids) if chunk.delimited else [ids]
            split: str = chunk.split
            if split == "first_shard":
                self.first_shard_full |= val_tokens + sum(map(len, whole)) > self.shard_tokens
                split = "train" if self.first_shard_full else "val"
            if split == "val":
                val_tokens += sum(map(len, whole))
            added[split] += whole
            documents[split] += chunk.first
            text_bytes[split] += size
        for split, parts in added.items():
            if parts:
                self._append(split, np.concatenate(parts), documents[split], text_bytes[split])
        self.batches += 1
        self.left_out = batch.left_out
        if time.monotonic() - self._journalled > _JOURNAL_SECONDS:
            self.journal()

    def journal(self) -> None:
        """Sync the shards and record how far they have come."""
        for writer in self.writers.values():
            writer.sync()
        state = {
            "batches": self.batches,
            "left_out": self.left_out,
            "first_shard_full": self.first_shard_full,
            "splits": self._records,
        }
        output_dir.write_journal(self.out, self.identity, state)
        self._journalled = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Complete the last shards; the manifest's entries of the splits."""
        for writer in self.writers.values():
            writer.finish()
        return self._records

    def close(self) -> None:
        """Close the files without completing the last shards."""
        for writer in self.writers.values():
            writer.close()

    def _append(self, split: str, ids: np.ndarray, documents: int, text_bytes: int) -> None:
        """Append to a split, up to the limit on training tokens."""
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

"""Writes encoded batches to the shards of an unfinished corpus, and its journal.

Every few seconds the journal records how many batches the shards hold. A writer that is made of the
journal's state cuts the shards back to that.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptsmith.data import output_dir
from gptsmith.data.encode import EncodedPart
from gptsmith.data.options import PrepareConfig
from gptsmith.data.output_dir import Identity
from gptsmith.data.shards import SPLITS, UNFINISHED, ShardWriter
from gptsmith.tokenizer import Tokenizer

_JOURNAL_SECONDS = 5.0  # what a kill may cost


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
        self._eos = np.array([tokenizer.eos_id], tokenizer.dtype)
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

    def write(self, parts: Sequence[EncodedPart], left_out: dict[str, int]) -> None:
        """Append a batch; now and then, bring the journal up to date."""
        for split, of_split in self._assign(parts).items():
            if of_split:
                self._append(split, of_split)
        self.batches += 1
        self.left_out = left_out
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
        """Close the files, as they are."""
        for writer in self.writers.values():
            writer.close()

    def _assign(self, parts: Sequence[EncodedPart]) -> dict[str, list[EncodedPart]]:
        """The parts of each split. "first_shard": whole documents to validation until the next
        would not fit into its first shard."""
        assigned: dict[str, list[EncodedPart]] = {split: [] for split in SPLITS}
        val_tokens = self.tokens("val")
        for part in parts:
            split: str = part.part.split
            size = len(part.ids) + part.part.eos
            if split == "first_shard":
                self.first_shard_full |= val_tokens + size > self.shard_tokens
                split = "train" if self.first_shard_full else "val"
            if split == "val":
                val_tokens += size
            assigned[split].append(part)
        return assigned

    def _append(self, split: str, parts: Sequence[EncodedPart]) -> None:
        ids = np.concatenate(
            [array for p in parts for array in ((self._eos, p.ids) if p.part.eos else (p.ids,))]
        )
        documents = sum(p.part.first for p in parts)
        text_bytes = sum(p.text_bytes for p in parts)
        if split == "train" and self.max_tokens is not None:
            room = self.max_tokens - self.tokens("train")
            if room < len(ids):
                ids = ids[:room]
                documents = min(documents, int(np.count_nonzero(ids == self._eos)))
                text_bytes = int(self.token_bytes[ids].sum(dtype=np.int64))
        self.writers[split].append(ids, documents=documents, text_bytes=text_bytes)

"""A prepared corpus on disk: token shards, a tokenizer, and a manifest that is written last.

    data/NAME/
      manifest.json       contents and origin of the corpus; it exists only once it is complete
      tokenizer.json
      train-00000.npy ... val-00000.npy ...    uint16 or uint32, one dimension

A split is one stream of tokens. A document is <|endoftext|> followed by its tokens, so that its
first token has a context too. With a tokenizer that begins texts with another token, it is that
token, the document's tokens and the end of text (see `document` in the manifest).

`prepare` cuts the stream into shards of equal length; a document that does not fit continues in the
next one. With --tasks each part of the sources has shards of its own (train-00003-00000.npy is the
first one of part 3). Readers accept shards of any length, as given by the manifest.

While a corpus is being made, its files and a journal (progress.json) are in the folder
`unfinished`.
"""

import hashlib
import json
import operator
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from gptsmith import files
from gptsmith.recognize import is_corpus, wrong_kind
from gptsmith.tokenizer import DocumentTokens, Tokenizer
from gptsmith.tokenizer.roles import stored_fingerprint

FORMAT = 1
SPLITS = ("train", "val")
MANIFEST, JOURNAL, UNFINISHED = "manifest.json", "progress.json", "unfinished"
_COUNTS = ("tokens", "documents", "bytes")
# numpy pads its header to a multiple of 64 bytes. This fixed size has room for any length, so that
# tokens can be appended before their number is known.
_HEADER_BYTES = 128
MAX_SHARDS = 500  # per split: each is an open file in a process that uses the corpus
_REMEDY = "copy the file again or prepare the corpus again"


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """A complete corpus, opened read-only.

    manifest      the parsed manifest.json
    train, val    the shards of each split, memory-mapped; each is verified on first use
    """

    path: Path
    manifest: dict[str, Any]
    train: "Shards"
    val: "Shards"

    @property
    def fingerprint(self) -> str:
        """sha256 over tokenizer and tokens: equal for equal training data."""
        return str(self.manifest["fingerprint"])

    def __repr__(self) -> str:
        tokens = f"{self.train_tokens:,} training and {self.val_tokens:,} validation tokens"
        return f"Corpus({str(self.path)!r}, {tokens})"

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """The corpus in the folder `path`; names, sizes and headers of the shards are checked.

        FileNotFoundError if there is none or a shard is missing, ValueError naming a damaged one,
        or saying what else is at `path`.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no prepared corpus here; `gptsmith prepare SOURCE --out {path}` makes one"
            )
        if not is_corpus(path):
            raise wrong_kind(path, "a prepared corpus")
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{path}: this corpus is unfinished; run the same `gptsmith prepare` again to "
                "resume it"
            )
        manifest = files.read_json(path / MANIFEST)
        try:
            files.check_format(
                f"{path}/manifest.json: format", manifest["format"], FORMAT,
                "prepare the corpus again",
            )  # fmt: skip
            intact = manifest["fingerprint"] == fingerprint(manifest)
            intact &= manifest.get("digest") in (None, manifest_digest(manifest))
            splits = {split: Shards(path, manifest, split) for split in SPLITS}
            for split, record in manifest["splits"].items():
                tokens, *_ = (operator.index(record[name]) for name in _COUNTS)
                intact &= sum(splits[split].lengths) == tokens
        except (KeyError, TypeError, AttributeError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else "a value of another type"
            raise ValueError(
                f"{path}/manifest.json: not a corpus manifest ({why}); prepare the corpus again"
            ) from None
        if not intact:
            raise ValueError(
                f"{path}/manifest.json: inconsistent (edited?); prepare the corpus again"
            )
        return cls(path, manifest, splits["train"], splits["val"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; ValueError if tokenizer.json is another one."""
        if stored_fingerprint(self.path) != self.manifest["tokenizer"]["fingerprint"]:
            raise ValueError(
                f"{self.path}/tokenizer.json: not the tokenizer that made this corpus; "
                "restore that one or prepare the corpus again"
            )
        return Tokenizer.load(self.path)

    @cached_property
    def document(self) -> DocumentTokens:
        """The tokens around each document; by default, the end of text before it."""
        given = self.manifest.get("document")
        if given is None:
            return DocumentTokens((self.tokenizer.eos_id,))
        try:
            return DocumentTokens(
                *(tuple(map(operator.index, given[name])) for name in DocumentTokens._fields)
            )
        except (KeyError, TypeError):
            raise ValueError(
                f"{self.path}/manifest.json: document is {given!r:.60}; prepare the corpus again"
            ) from None

    @property
    def train_tokens(self) -> int:
        return int(self.manifest["splits"]["train"]["tokens"])

    @property
    def val_tokens(self) -> int:
        return int(self.manifest["splits"]["val"]["tokens"])

    def verify(self) -> None:
        """Read everything and compare it with the manifest. ValueError naming a damaged file."""
        self.val.verify()
        self.train.verify()
        assert self.tokenizer is not None


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 over what training depends on: the tokenizer and the tokens of each split."""
    seen = {
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        "splits": {
            split: [(shard["tokens"], shard["sha256"]) for shard in record["shards"]]
            for split, record in sorted(manifest["splits"].items())
        },
    }
    if "document" in manifest:
        seen["document"] = manifest["document"]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


class Shards(Sequence[np.ndarray]):
    """The shards of a split: memory-mapped arrays of token ids.

    On its first use a shard is read completely; ValueError naming it unless it has the sha256 of
    the manifest and no ids outside the vocabulary. lengths: number of tokens of each shard.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], split: str) -> None:
        """Checks names, sizes and headers; raises as Corpus.open does."""
        self._folder, self._records = folder, manifest["splits"][split]["shards"]
        self._arrays = [_open_shard(folder, shard, manifest["dtype"]) for shard in self._records]
        size = manifest["tokenizer"].get("vocab_size")
        self._vocab_size = None if size is None else operator.index(size)
        self._verified = [False] * len(self._arrays)
        self._damage: Exception | None = None  # found in the background
        self.lengths = [len(array) for array in self._arrays]

    def __repr__(self) -> str:
        return f"Shards({len(self)} files, {sum(self.lengths):,} tokens)"

    def __len__(self) -> int:
        return len(self._arrays)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        array = self._arrays[index]
        if self._damage is not None:
            raise self._damage
        if not self._verified[index]:
            self._verify(index)
        return array

    def verify(self) -> None:
        """Verify all shards that have not been used yet."""
        for index in range(len(self)):
            _ = self[index]

    def verify_in_background(self) -> None:
        """Verify all shards in a thread, while training begins.

        Once a damaged one is found, the next use of any shard raises the error.
        """

        def read() -> None:
            try:
                self.verify()
            except (ValueError, OSError) as error:
                self._damage = error

        threading.Thread(target=read, name="verify shards", daemon=True).start()

    def _verify(self, index: int) -> None:
        path, array = self._folder / self._records[index]["file"], self._arrays[index]
        if files.sha256(path) != self._records[index]["sha256"]:
            raise ValueError(f"{path}: damaged (its sha256 is not the manifest's); {_REMEDY}")
        highest = int(array.max()) if len(array) else 0
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise ValueError(
                f"{path}: holds token id {highest}, but its tokenizer ends at "
                f"{self._vocab_size - 1}; prepare the corpus again"
            )
        self._verified[index] = True


def manifest_digest(content: Mapping[str, Any]) -> str:
    """sha256 of a manifest or journal, stored in it as `digest` (missing in earlier versions)."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _open_shard(folder: Path, shard: dict[str, Any], dtype: str) -> np.ndarray:
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: this shard is missing; {_REMEDY}") from None
    expected = _HEADER_BYTES + shard["tokens"] * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(f"{path}: {size} bytes instead of {expected}: damaged; {_REMEDY}")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's errors for a damaged header are of many kinds
        raise ValueError(f"{path}: not a readable .npy file ({error}); {_REMEDY}") from None
    if array.dtype != np.dtype(dtype) or array.shape != (shard["tokens"],):
        raise ValueError(
            f"{path}: holds {array.dtype} {array.shape}, the manifest says {dtype} "
            f"({shard['tokens']},); {_REMEDY}"
        )
    return array


class ShardWriter:
    """Appends tokens to one split of a corpus that is being made.

    `record` is the manifest's entry for this split. Tokens beyond its list of shards are in the
    last file, which gets its header when it is full; record and files are sufficient to resume.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype,
        shard_tokens: int,
        record: dict[str, Any] | None = None,
    ) -> None:
        """name: of the shards, before their numbers. record: that of an interrupted run. Tokens
        written after it are dropped; ValueError or FileNotFoundError if tokens that it counts are
        missing."""
        self.folder, self.name, self.dtype = folder, name, dtype
        self.shard_tokens = shard_tokens
        self.record = record or {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
        for shard in self.record["shards"]:
            _open_shard(folder, shard, dtype.name)
        self._filled = self.tokens - sum(shard["tokens"] for shard in self.record["shards"])
        self._file = self._open_shard() if self._filled else None

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.record['shards']):05d}.npy"

    @property
    def tokens(self) -> int:
        return int(self.record["tokens"])

    def append(self, ids: np.ndarray, *, documents: int, text_bytes: int) -> None:
        """Add `ids`; they may fill several shards."""
        self.record["tokens"] += len(ids)
        self.record["documents"] += documents
        self.record["bytes"] += text_bytes
        ids = np.ascontiguousarray(ids, self.dtype)
        while len(ids):
            self._file = self._file or self._open_shard()
            now = ids[: self.shard_tokens - self._filled]
            with files.naming(self._path):
                self._file.write(now.data)
            self._filled += len(now)
            ids = ids[len(now) :]
            if self._filled == self.shard_tokens:
                self._finish_shard()

    def sync(self) -> None:
        """Flush what was appended to disk."""
        if self._file:
            with files.naming(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Complete the last shard."""
        if self._file:
            self._finish_shard()

    def close(self) -> None:
        """Close the file without completing the shard."""
        if self._file:
            with suppress(OSError):  # what could not be written before cannot be written now
                self._file.close()

    def _open_shard(self) -> BinaryIO:
        """The last file, truncated to the recorded tokens, or a new one."""
        size = _HEADER_BYTES + self._filled * self.dtype.itemsize
        if self._filled and (found := self._path.stat().st_size) < size:
            raise ValueError(f"{self._path}: {found} bytes, {size} were written before")
        if len(self.record["shards"]) == MAX_SHARDS:
            raise too_many_shards(self.shard_tokens)
        file = self._path.open("r+b" if self._filled else "wb")
        with files.naming(self._path):
            file.truncate(size)
            file.seek(size)
        return file

    def _finish_shard(self) -> None:
        assert self._file
        with files.naming(self._path):
            self._file.seek(0)
            self._file.write(_header(self.dtype, self._filled))
            self.sync()
            self._file.close()
        files.sync(self.folder)
        path, digest = self._path, files.sha256(self._path)
        shard = {"file": path.name, "tokens": self._filled, "sha256": digest}
        self.record["shards"].append(shard)
        self._file, self._filled = None, 0


def too_many_shards(shard_tokens: int) -> ValueError:
    return ValueError(
        f"more than {MAX_SHARDS:,} shards of {shard_tokens:,} tokens: give a larger --shard-tokens"
    )


def _header(dtype: np.dtype, tokens: int) -> bytes:
    """Version 1.0 of the .npy format (numpy.lib.format), padded to a fixed size."""
    fields = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (tokens,)}
    length = _HEADER_BYTES - 10
    text = str(fields).encode().ljust(length - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text

"""Files of token ids that other trainers write: nanoGPT's and llm.c's .bin, datatrove's .ds.

    nanoGPT    uint16 (in some forks uint32) from the first byte on; an end of text after each
               document
    llm.c      256 int32 (magic number, version, tokens), then uint16 (GPT-2) or uint32 (Llama 3);
               an end of text before each document
    datatrove  uint16 or uint32; NAME.ds.index has the end of each document, as uint64, and
               NAME.ds.metadata the tokenizer's name, the bytes per token and the number of tokens

All are little-endian. Sources: nanoGPT data/openwebtext/prepare.py, llm.c dev/data/data_common.py,
datatrove pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptsmith import files
from gptsmith.data.documents import Document
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.token_tables import without_document_tokens
from gptsmith.recognize import binary_kind, wrong_kind
from gptsmith.tokenizer import DocumentTokens

SUFFIXES = (".bin", ".ds")
_BLOCK = 1 << 20  # tokens of a chunk
_HEADER = 256  # int32 at the beginning of llm.c's files
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic number: version, type of a token
_NAMED = re.compile(r"(.*[_-])?(train|val)([_-].*)?\.bin")  # as nanoGPT and its forks name them
_VALIDATION = re.compile(r"(.*[_-])?val([_-].*)?\.(bin|ds)")


class TokenFile(NamedTuple):
    """kind: "nanoGPT", "llm.c" or "datatrove". start: bytes before the first token.

    tokenizer: its name, where the file's metadata give it.
    """

    path: Path
    kind: str
    dtype: np.dtype
    start: int
    tokens: int
    tokenizer: str = ""


@dataclass(frozen=True)
class TokenFiles:
    """The files of a source, in reading order."""

    files: tuple[TokenFile, ...]

    def __str__(self) -> str:
        kinds, tokens = {file.kind for file in self.files}, sum(file.tokens for file in self.files)
        names = sorted({file.tokenizer for file in self.files if file.tokenizer})
        made = f", made with {', '.join(names)}" if names else ""
        return f"{tokens:,} token ids in files of {', '.join(sorted(kinds))}{made}"

    @property
    def vocabulary(self) -> Path | None:
        """The meta.pkl of nanoGPT next to the files, a vocabulary of their own; it is not read."""
        found = (file.path.parent / "meta.pkl" for file in self.files if file.kind == "nanoGPT")
        return next((path for path in found if path.is_file()), None)

    def documents(
        self, document_tokens: DocumentTokens, vocab_size: int, report: ReadReport
    ) -> Iterator[Document]:
        """The documents, without the tokens around them. A document that continues in the next file
        is divided. ValueError naming file and position of an id outside the vocabulary."""
        separators = {*document_tokens.before, *document_tokens.after}
        for file in self.files:
            mapped = np.memmap(file.path, file.dtype, "r", file.start, (file.tokens,))
            ids = np.asarray(mapped)
            ends = _document_ends(file.path) if file.kind == "datatrove" else None
            spans = _between(ids, separators) if ends is None else pairwise([0, *ends.tolist()])
            for start, end in spans:
                document = ids[start:end]
                _check_ids(document, start, file, vocab_size)
                document = without_document_tokens(document, document_tokens)
                report.reached(file.path, file.start + end * file.dtype.itemsize)
                place = f"{file.path}, token {start:,}"
                if len(document):
                    blocks = range(0, len(document), _BLOCK)
                    yield Document(place, [document[at : at + _BLOCK] for at in blocks])
                else:
                    report.reject("empty document", place, "an empty document")


def _between(ids: np.ndarray, separators: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Start and end of what is between separators."""
    start = 0
    for at in range(0, len(ids), _BLOCK):
        block = ids[at : at + _BLOCK]
        found = np.zeros(len(block), bool)
        for token in separators:
            found |= block == token
        for end in (at + np.flatnonzero(found)).tolist():
            if end > start:
                yield start, end
            start = end + 1
    if start < len(ids):
        yield start, len(ids)


def _check_ids(ids: np.ndarray, start: int, file: TokenFile, vocab_size: int) -> None:
    if len(ids) and ids.max() >= vocab_size:
        first = int(np.argmax(ids >= vocab_size))
        raise ValueError(
            f"{file.path}, token {start + first:,}: token id {ids[first]} is outside the "
            f"tokenizer's 0..{vocab_size - 1}; give the --tokenizer that made these ids"
        )


# --- recognition ---------------------------------------------------------------------------------


def is_token_file(path: Path) -> bool:
    """Whether a file of a folder holds token ids, by its name or llm.c's header."""
    if has_suffix(path, ".ds"):
        return True
    return has_suffix(path, ".bin") and bool(_NAMED.fullmatch(path.name) or _magic(path) in _LLM_C)


def split_validation(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of a folder for training and for validation (val.bin, fineweb_val_000000.bin).

    All are for training if they would all be for validation.
    """
    val = [path for path in paths if _VALIDATION.fullmatch(path.name)]
    train = [path for path in paths if path not in val]
    return (train, val) if train else (val, [])


def open_token_files(paths: Iterable[Path], report: ReadReport) -> TokenFiles:
    """Read the headers and metadata of the files. ValueError naming a damaged or unknown one."""
    opened = tuple(_datatrove(p, report) if has_suffix(p, ".ds") else _bin(p) for p in paths)
    if empty := next((file.path for file in opened if not file.tokens), None):
        raise ValueError(f"{empty}: no token ids in it")
    return TokenFiles(opened)


def _magic(path: Path) -> int:
    """The first int32 of a file; 0 if it is shorter."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(4).ljust(4, b"\0"), "little")


def _bin(path: Path) -> TokenFile:
    magic, size = _magic(path), path.stat().st_size
    if magic in _LLM_C:
        version, dtype = _LLM_C[magic][0], np.dtype(_LLM_C[magic][1])
        header = np.fromfile(path, "<i4", _HEADER)
        tokens, expected = int(header[2]) if len(header) == _HEADER else 0, 4 * _HEADER
        expected += tokens * dtype.itemsize
        if len(header) < _HEADER or header[1] != version or size != expected:
            raise ValueError(
                f"{path}: llm.c's header of version {header[1] if len(header) > 1 else '?'} says "
                f"{tokens:,} tokens ({expected:,} bytes), the file has {size:,} bytes; it is "
                "damaged, or of a version that is not known"
            )
        return TokenFile(path, "llm.c", dtype, 4 * _HEADER, tokens)
    if 20240101 <= magic <= 20241231:
        raise ValueError(f"{path}: another file of llm.c (number {magic}), not token ids")
    with path.open("rb") as file:
        head = file.read(4096)
    kind = binary_kind(head)
    if size % 2 or (kind is not None and kind.what != "a binary file"):
        raise wrong_kind(path, "a file of token ids (two bytes each, or with llm.c's header)")
    # In uint32, the upper halves of all ids are small, which no text in uint16 looks like.
    halves = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    wide = size % 4 == 0 and len(halves) >= 32 and halves[1::2].max() < 16 <= halves[::2].max()
    dtype = np.dtype("<u4" if wide else "<u2")
    return TokenFile(path, "nanoGPT", dtype, 0, size // dtype.itemsize)


def _document_ends(path: Path) -> np.ndarray | None:
    """The position after the last token of each document, if the file has an index."""
    index = _beside(path, ".index")
    if not index.is_file():
        return None
    ends = np.fromfile(index, "<u8").astype(np.int64)
    if not len(ends) or (np.diff(ends, prepend=0) < 0).any():
        raise ValueError(f"{index}: no ends of documents in ascending order; copy the file again")
    return ends


def _datatrove(path: Path, report: ReadReport) -> TokenFile:
    """A .ds file. The bytes per token follow from its metadata or its index."""
    size, ends, name = path.stat().st_size, _document_ends(path), ""
    metadata = _beside(path, ".metadata")
    if metadata.is_file():
        first, total, *_ = [*files.read_text(metadata).splitlines(), "", ""]
        name, _, digits = first.rpartition("|")
        width, tokens = (int(text) if text.isdecimal() else 0 for text in (digits, total))
    elif ends is not None:
        tokens = int(ends[-1])
        width = size // max(tokens, 1)
    else:
        raise ValueError(
            f"{path}: {path.name}.index or {path.name}.metadata should be next to it, which say "
            "how many bytes a token has; copy one of them too"
        )
    indexed = tokens if ends is None else int(ends[-1])
    if width not in (2, 4) or tokens * width != size or indexed != tokens:
        raise ValueError(
            f"{path}: {size:,} bytes, but its index and metadata say {indexed:,} and {tokens:,} "
            f"tokens of {width} bytes: damaged; copy the files again"
        )
    if _beside(path, ".loss").is_file():
        report.hint(f"{_beside(path, '.loss')}: not used; all tokens are targets")
    return TokenFile(path, "datatrove", np.dtype(f"<u{width}"), 0, tokens, name)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)

"""What every source yields, and what happens to records that cannot be read.

A bad record is an error that names file and line (or row, or byte), or is left out and counted:
the user chooses.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

Piece = str | np.ndarray


class Document(NamedTuple):
    """One document: text in pieces whose ids, joined, are the ids of the whole; or ids already.

    place     where it comes from, for messages: "notes.txt", "chat.jsonl:17"
    pieces    str, or arrays of token ids; can be iterated more than once
    begins    whether <|endoftext|> is to be put before it
    """

    place: str
    pieces: Iterable[Piece]
    begins: bool = True


@dataclass
class Reader:
    """How the user wants files read, what was left out on the way, and how far reading has come."""

    text_column: str | None = None
    separator: str | None = None
    skip: bool = False
    left_out: dict[str, set[int]] = field(default_factory=dict)  # kind -> hashes of the places
    hints: dict[str, None] = field(default_factory=dict)  # said once each, in this order
    starts: dict[Path, int] = field(default_factory=dict)  # bytes of the files before this one
    position: int = 0  # bytes of all files

    def problem(self, kind: str, place: str, what: str) -> None:
        """A record that cannot be used: ValueError, or counted under `kind`.

        A set of places rather than a counter, because files are read more than once.
        """
        if not self.skip:
            raise ValueError(f"{place}: {what}; --on-error skip leaves such records out")
        self.left_out.setdefault(kind, set()).add(hash(place))

    def reached(self, path: Path, offset: int) -> None:
        self.position = self.starts.get(path, 0) + offset


def document(place: str, text: str, reader: Reader) -> Iterator[Document]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"not valid Unicode at character {error.start} ({error.reason})"
        reader.problem("row that is not UTF-8", place, what)
        return
    if text.strip():
        yield Document(place, (text,))
    else:
        reader.problem("empty document", place, "an empty document")


class UnavailableError(FileNotFoundError):
    """A source that is well named but not here: the next alternative may be tried."""


def named_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file of a path that is no folder, or the files of a pattern, sorted."""
    if path.is_file():
        found = [path]
    elif path.exists():
        raise ValueError(f"{path}: neither a file nor a folder; copy what it gives into a file")
    elif glob.has_magic(str(path)):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise UnavailableError(f"{path}: no file fits this pattern")
    else:
        raise UnavailableError(f"{path}: no such file or folder")
    for file in found:
        if not file.name.lower().endswith(tuple(suffixes)):
            raise ValueError(f"{file}: not a file of {', '.join(suffixes)}; rename it if it is")
    return found


@dataclass(frozen=True)
class Source:
    """An opened source of documents.

    used           what was opened, as the manifest records it
    documents      starts reading from the beginning
    files          the local files behind it, in reading order
    validation     the source's own validation documents
    first_shard    the source validates on its first shard of tokens
    layout         of files that hold token ids instead of text
    asked, passed  the user's words, and why alternatives to the left were not used
    """

    used: str
    documents: Callable[[], Iterator[Document]]
    files: tuple[Path, ...] = ()
    validation: Callable[[], Iterator[Document]] | None = None
    first_shard: bool = False
    layout: object | None = None
    asked: str = ""
    passed: tuple[str, ...] = ()

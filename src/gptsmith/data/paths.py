"""Find the files of a path, a folder or a pattern, in a fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gptsmith.data.report import ReadReport

# Files that `datasets` writes next to the data, or a download of the Hub brings along.
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_BLANK = 4096  # only files of at most this size are checked for being blank


class UnavailableError(FileNotFoundError):
    """A valid source that is not available; the next alternative may be tried."""


class FoundFiles(NamedTuple):
    """The files to read, and the empty ones of a folder or pattern."""

    files: list[Path]
    empty: Sequence[Path] = ()

    def count_empty(self, report: ReadReport) -> None:
        """Count the empty files as skipped."""
        for path in self.empty:
            report.skipped.add("empty file", str(path))


def find_files(path: str | Path, belongs: Callable[[Path], bool], kinds: str) -> FoundFiles:
    """The file at a path, all files of a pattern, or those of a folder that `belongs` accepts.

    In a folder, hidden files and the metadata of `datasets` are ignored. kinds: what is looked for
    in a folder, for messages. UnavailableError (a FileNotFoundError) if there is no file,
    PermissionError for a folder that cannot be read, ValueError for a folder with several splits.
    """
    path = Path(path)
    if path.is_file():
        return FoundFiles([path])
    if path.is_dir():
        found = [p for p in files_below(path) if belongs(p)]
        if not found:
            raise UnavailableError(f"{path}: no {kinds} in this folder")
    elif path.exists():
        raise ValueError(f"{path}: neither a file nor a folder; write its content to a file")
    elif glob.has_magic(str(path)):
        matches = map(Path, glob.glob(str(path), recursive=True))
        # ** follows links, perhaps in a circle: a file that is matched twice is read once.
        nearest_last = sorted(matches, key=lambda p: (len(p.parts), p), reverse=True)
        files = {p.resolve(): p for p in nearest_last if p.is_file()}
        found = sorted(files.values())
        if not found:
            raise UnavailableError(f"{path}: no file matches this pattern")
    else:
        is_address = path.parts[:1] in (("http:",), ("https:",))
        remedy = " (an address: download it, and give the file)" if is_address else ""
        raise UnavailableError(f"{path}: no such file or folder{remedy}")
    empty = {p for p in found if p.stat().st_size <= _BLANK and not p.read_bytes().strip()}
    if len(empty) == len(found):
        raise ValueError(f"{path}: its files ({len(found)}) are all empty")
    return FoundFiles([p for p in found if p not in empty], sorted(empty))


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, except hidden ones and the metadata of `datasets`."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        example = f", for example {folder / splits[0]}" if splits else ""
        raise ValueError(f"{folder}: holds the splits {', '.join(splits)}; name one{example}")
    files = []
    for p in (folder, *sorted(folder.rglob("*"))):
        if any(part.startswith(".") for part in p.relative_to(folder).parts):
            continue
        if p.is_dir() and not os.access(p, os.R_OK | os.X_OK):  # rglob skips them silently
            raise PermissionError(f"{p}: no permission to read this folder")
        if p.is_file() and p.name not in _METADATA and not p.name.startswith("cache-"):
            files.append(p)
    return files


def has_suffix(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)

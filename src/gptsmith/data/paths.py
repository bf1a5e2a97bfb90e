"""The files of a path, a folder or a pattern, in a fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

# Files that `datasets` writes next to the data, or a download of the Hub brings along.
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


class UnavailableError(FileNotFoundError):
    """A valid source that is not available; the next alternative may be tried."""


def find_files(path: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """The file of a path, or all files of a folder or pattern that have one of the suffixes.

    In a folder, hidden files and what `datasets` adds are skipped. UnavailableError (a
    FileNotFoundError) if there is no file, PermissionError for a folder that cannot be read,
    ValueError for a file of another kind and for a folder with several splits.
    """
    path = Path(path)
    if path.is_dir():
        found = [p for p in files_below(path) if has_suffix(p, *suffixes)]
        if not found:
            raise UnavailableError(f"{path}: no file of {', '.join(suffixes)} in this folder")
        return found
    if path.is_file():
        found = [path]
    elif path.exists():
        raise ValueError(f"{path}: neither a file nor a folder; write its content to a file")
    elif glob.has_magic(str(path)):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise UnavailableError(f"{path}: no file matches this pattern")
    else:
        raise UnavailableError(f"{path}: no such file or folder")
    for file in found:
        if not has_suffix(file, *suffixes):
            raise ValueError(f"{file}: not a file of {', '.join(suffixes)}; rename it if it is")
    return found


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, except hidden ones and what `datasets` adds."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        example = f", for example {folder / splits[0]}" if splits else ""
        raise ValueError(f"{folder}: holds the splits {', '.join(splits)}; name one{example}")
    below = [
        p
        for p in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    for p in (folder, *below):  # rglob skips them silently
        if p.is_dir() and not os.access(p, os.R_OK | os.X_OK):
            raise PermissionError(f"{p}: no permission to read this folder")
    return [
        p
        for p in below
        if p.is_file() and p.name not in _METADATA and not p.name.startswith("cache-")
    ]


def has_suffix(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)

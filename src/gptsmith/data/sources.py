"""What the user names as text: corpora, files, folders, patterns, data sets of the Hub.

What was asked for is what is used. An alternative is one that the user wrote, as in
`wikipedia|wikitext-2`: tried from left to right, and the choice is recorded with its reason.
"""

import dataclasses
import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptsmith.data import corpora
from gptsmith.data.documents import Document, Reader, Source, UnavailableError, named_files
from gptsmith.data.tables import table_documents
from gptsmith.data.text_files import text_documents
from gptsmith.data.tokenized import IDS, Layout, examine, holds_ids

_TEXT = (".txt", ".md")
_TABLES = (".parquet", ".arrow")
SUFFIXES = (*_TEXT, ".jsonl", ".jsonl.gz", ".csv", ".tsv", *_TABLES)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*(:[\w.-]+)?)?")


def open_source(asked: str, reader: Reader) -> Source:
    """The source called `asked`, or the first of its alternatives that can be had.

    ValueError for a name that means nothing, FileNotFoundError for one that is not here.
    """
    # a file may have the sign in its name
    names = [asked] if Path(asked).exists() else [name.strip() for name in asked.split("|")]
    for name in names:
        _check_name(name, asked)
    passed: list[str] = []
    for name in names:
        try:
            source = _open(name, reader)
        except UnavailableError as error:
            passed.append(str(error))
        else:
            return dataclasses.replace(source, asked=asked, passed=tuple(passed))
    raise FileNotFoundError("; ".join(passed))


def _is_path(name: str) -> bool:
    """A local path, there or not. `owner/name` is the Hub's unless it is there."""
    looks = name.startswith(("/", "./", "../", "~")) or name.lower().endswith(SUFFIXES)
    return looks or glob.has_magic(name) or Path(name).exists()


def _check_name(name: str, asked: str) -> None:
    if not name:
        raise ValueError(f"source {asked!r}: an empty name")
    if name in corpora.NAMES or _is_path(name) or _HUB_NAME.fullmatch(name):
        return
    near = difflib.get_close_matches(name, corpora.NAMES, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"corpora are {', '.join(corpora.NAMES)}"
    raise ValueError(f"source {name!r}: no such file, folder or corpus; {hint}")


def _open(name: str, reader: Reader) -> Source:
    if name in corpora.NAMES:
        if Path(name).exists():
            reader.hints[f"{name}: the corpus of that name is used; the file is ./{name}"] = None
        return corpora.open_named(name, reader, lambda path, used: _open_path(path, used, reader))
    if _is_path(name):
        try:
            path = Path(name).expanduser()
        except RuntimeError:
            raise ValueError(f"{name!r}: no such user's home folder; write the path out") from None
        return _open_path(path, name, reader)
    dataset, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    hub = corpora.HubName(dataset, config or None, split or "train")
    return corpora.open_hub(
        hub, reader, "without network, fetch its files elsewhere and give their folder instead"
    )


def _open_path(path: Path, name: str, reader: Reader) -> Source:
    paths = _files(path, reader)
    layout = _layout(paths, reader)

    def read() -> Iterator[Document]:
        for path in paths:
            yield from _read(path, reader)

    return Source(name, read, paths, layout=layout)


def _files(path: Path, reader: Reader) -> tuple[Path, ...]:
    """The files of a path, folder or pattern, in a fixed order."""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise ValueError(
                f"{path}: holds the splits {', '.join(splits)}; name one, for example "
                f"{path / splits[0] if splits else path}, and another with --val"
            )
        below = [
            p
            for p in sorted(path.rglob("*"))
            if not any(s.startswith(".") for s in p.relative_to(path).parts)
        ]
        for p in (path, *below):  # rglob is silent about them
            if p.is_dir() and not os.access(p, os.R_OK | os.X_OK):
                raise PermissionError(f"{p}: you may not read this folder")
        inside = [p for p in below if p.is_file()]
        # `datasets` keeps results of its own beside the data
        found = [p for p in inside if _known(p) and not p.name.startswith("cache-")]
        if not found:
            raise UnavailableError(f"{path}: no file of {', '.join(SUFFIXES)} in this folder")
        if len(found) < len(inside):
            others = len(inside) - len(found)
            reader.hints[f"{path}: {len(found)} files are read, {others} of other kinds not"] = None
        return tuple(found)
    return tuple(named_files(path, SUFFIXES))


def _known(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _layout(paths: Sequence[Path], reader: Reader) -> Layout | None:
    """How the files' token ids lie, if it is token ids that they hold."""
    tables = [path for path in paths if path.name.lower().endswith(_TABLES) and holds_ids(path)]
    if not tables or reader.text_column not in (None, IDS):
        return None
    if len(tables) < len(paths):
        other = next(path for path in paths if path not in tables)
        raise ValueError(f"{tables[0]} holds token ids, {other} does not; prepare them apart")
    if reader.text_column is None and (path := next(filter(_has_text, tables), None)):
        raise ValueError(
            f"{path}: holds text and token ids; say --text-column text or --text-column {IDS}"
        )
    return examine(tables, reader)


def _has_text(path: Path) -> bool:
    from gptsmith.data.tables import table_schema

    return "text" in table_schema(path).names


def _read(path: Path, reader: Reader) -> Iterator[Document]:
    """The documents of one file."""
    if path.stat().st_size == 0:
        reader.problem("empty file", str(path), "the file is empty")
    elif path.name.lower().endswith(_TEXT):
        yield from text_documents(path, reader)
    else:
        yield from table_documents(path, reader)

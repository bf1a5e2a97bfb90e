"""Open sources of text by name: corpora, files, folders, patterns, data sets of the Hub.

The user may list alternatives, as in `wikipedia|wikitext-2`. They are tried from left to right, and
the choice is recorded with its reason; nothing else is substituted.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from gptsmith.data import columnar, columns, corpora, hub, rows, text_files, token_files
from gptsmith.data.documents import Document, Source, table_documents
from gptsmith.data.encode import encode_at
from gptsmith.data.options import ReadOptions
from gptsmith.data.paths import UnavailableError, files_below, find_files, has_suffix
from gptsmith.data.report import ReadReport
from gptsmith.data.token_tables import IDS, TokenTables, find_token_tables, open_token_tables
from gptsmith.recognize import binary_kind, is_artifact, wrong_kind
from gptsmith.tokenizer import Tokenizer

# Without .json: in a folder, such files rarely hold text.
_TABLES = tuple(s for s in rows.SUFFIXES if s not in (".json", ".json.gz"))
SUFFIXES = (*text_files.SUFFIXES, *_TABLES, *token_files.SUFFIXES)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*(:[\w.-]+)?)?")


def open_source(requested: str, options: ReadOptions, report: ReadReport) -> Source:
    """The source called `requested`, or the first of its alternatives that is available.

    ValueError for an unknown name, FileNotFoundError if none is available.
    """
    names = [name.strip() for name in requested.split("|")]
    if Path(requested).exists():  # a file name may contain "|"
        names = [requested]
    for name in names:
        _check_name(name, requested)
    unavailable: list[str] = []
    for name in names:
        try:
            source = _open(name, options, report)
        except UnavailableError as error:
            unavailable.append(str(error))
        else:
            return dataclasses.replace(source, requested=requested, unavailable=tuple(unavailable))
    raise FileNotFoundError("; ".join(unavailable))


def encode_source(
    requested: str, tokenizer: Tokenizer, options: ReadOptions, report: ReadReport
) -> tuple[np.ndarray, int]:
    """The ids of all documents of a source, in memory, and their number of UTF-8 bytes.

    Document tokens are added as in a corpus, so that every token has a context. Raises as
    open_source does, and ValueError for a source without text or with token ids.
    """
    source = open_source(requested, options, report)
    if source.token_ids is not None:
        raise ValueError(f"{source.used}: holds token ids; gptsmith prepare makes a corpus of it")
    document_tokens = tokenizer.special_ids.document
    parts: list[np.ndarray] = []
    text_bytes = 0
    for document in source.documents():
        text = "".join(map(str, document.chunks))  # not by chunks, which could split a word
        (ids,) = encode_at([(document.place, text)], tokenizer.encode_arrays)
        parts += document_tokens.around(ids) if document.delimited else [ids]
        text_bytes += len(text.encode())
    if not parts:
        raise ValueError(f"{requested}: no text in it")
    return np.concatenate(parts), text_bytes


def _is_path(name: str) -> bool:
    """Whether this is a local path. `owner/name` is a data set of the Hub unless it exists here."""
    looks = name.startswith(("/", "./", "../", "~")) or has_suffix(Path(name), *SUFFIXES)
    return looks or glob.has_magic(name) or Path(name).exists()


def _check_name(name: str, requested: str) -> None:
    if not name:
        raise ValueError(f"source {requested!r}: an empty name")
    if name in corpora.NAMES or _is_path(name) or _HUB_NAME.fullmatch(name):
        return
    near = difflib.get_close_matches(name, corpora.NAMES, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"corpora are {', '.join(corpora.NAMES)}"
    raise ValueError(f"source {name!r}: no such file, folder or corpus; {hint}")


def _open(name: str, options: ReadOptions, report: ReadReport) -> Source:
    if name in corpora.NAMES:
        if Path(name).exists():
            report.hint(f"{name}: the corpus of that name is used; the file is ./{name}")
        return corpora.open_named(name, options, report, _open_path)
    if _is_path(name):
        try:
            path = Path(name).expanduser()
        except RuntimeError:
            raise ValueError(f"{name!r}: no such user's home folder; write the path out") from None
        return _open_path(path, name, options, report)
    dataset, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    data_set = hub.HubName(dataset, config or None, split or "train")
    remedy = "without network, download its files elsewhere and give their folder instead"
    return hub.open_hub(data_set, options, report, remedy)


def _open_path(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Source:
    if is_artifact(path):
        raise wrong_kind(path, "text")
    below = files_below(path) if path.is_dir() else []
    # In a folder with tables or token ids, other files are documentation.
    has_tables = any(has_suffix(file, *_TABLES) for file in below)
    has_tokens = any(map(token_files.is_token_file, below))

    def belongs(file: Path) -> bool:
        if has_tokens:
            return token_files.is_token_file(file)
        return has_suffix(file, *text_files.SUFFIXES, *_TABLES) or (
            not has_tables and _is_text(file)
        )

    found = find_files(path, belongs, "table (.jsonl, .csv, .parquet ...) and no text file")
    if others := set(below) - {*found.files, *found.empty}:
        report.hint(
            f"{path}: {_suffixes(found.files)} are read, {_suffixes(others)} not; a pattern "
            f"('{path}/**/*.SUFFIX') reads others"
        )
    if any(has_suffix(file, *token_files.SUFFIXES) for file in found.files):
        return _token_source(name, found.files, report, folder=bool(below))
    token_ids = _ids_of_tables(found.files, options, report)

    def read(paths: Sequence[Path]) -> Iterator[Document]:
        if paths[0] == found.files[0]:
            found.count_empty(report)
        for path in paths:
            yield from _read(path, options, report)

    documents = partial(read, found.files)
    return Source(name, documents, tuple(found.files), token_ids=token_ids, read=read)


def _token_source(name: str, files: Sequence[Path], report: ReadReport, *, folder: bool) -> Source:
    """Files of token ids of other trainers; in a folder, those named val are for validation."""
    if other := next((p for p in files if not has_suffix(p, *token_files.SUFFIXES)), None):
        raise ValueError(
            f"{other} holds text, other files of {name} token ids; prepare them separately"
        )

    def read() -> Iterator[Document]:
        raise AssertionError("needs a tokenizer: prepare reads token_ids instead")

    train, val = token_files.split_validation(files) if folder else (list(files), [])
    own = None
    if val:
        own = Source(name, read, tuple(val), token_ids=token_files.open_token_files(val, report))
    token_ids = token_files.open_token_files(train, report)
    return Source(name, read, (*train, *val), validation=own, token_ids=token_ids)


def _is_text(path: Path) -> bool:
    if has_suffix(path, ".json", ".json.gz"):
        return False
    with path.open("rb") as file:
        return binary_kind(file.read(1 << 12)) is None


def _suffixes(paths: Iterable[Path]) -> str:
    """The number of files of each suffix: "12 .py, 1 .md"."""
    counts = Counter(path.suffix or path.name for path in paths)
    shown = [f"{count:,} {suffix}" for suffix, count in sorted(counts.items())]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _ids_of_tables(
    paths: Sequence[Path], options: ReadOptions, report: ReadReport
) -> TokenTables | None:
    """The token ids of files; None if they hold text."""
    chosen = (options.text_column or IDS).strip().lower()
    tables = find_token_tables(paths) if chosen == IDS else []
    if not tables:
        return None
    both = (path for path in tables if columns.has_text(columnar.read_schema(path).names))
    if options.text_column is None and (path := next(both, None)):
        raise ValueError(
            f"{path}: holds text and token ids; use --text-column text or --text-column {IDS}"
        )
    return open_token_tables(tables, report)


def _read(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """The documents of one file."""
    if path.stat().st_size == 0:
        report.reject("empty file", str(path), "the file is empty")
    elif has_suffix(path, *rows.SUFFIXES):
        yield from table_documents(path, options, report)
    else:
        yield from text_files.text_documents(path, options, report)

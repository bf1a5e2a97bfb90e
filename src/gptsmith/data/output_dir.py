"""The output directory of `prepare`: whether a corpus may be created, resumed or replaced in it.

A corpus is made in the subfolder `unfinished` and moved out of it when it is complete; an existing
corpus stays intact until then. A journal records settings and sources: an unfinished corpus is
resumed only if they have not changed.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptsmith import files
from gptsmith.data.documents import Source
from gptsmith.data.encode import BATCH_SIZE
from gptsmith.data.options import PrepareConfig
from gptsmith.data.shards import JOURNAL, MANIFEST, UNFINISHED, manifest_digest
from gptsmith.data.text_files import CHUNK_BYTES
from gptsmith.tokenizer import DocumentTokens, Tokenizer

_PART = "part-"
TOKENIZER, ROLES = "tokenizer.json", "special_tokens.json"  # the second only if roles are declared

# What a corpus is made from and how: {"settings": ..., "sources": [...], "seen": ...}. "seen" is a
# digest of what must not change while a corpus is unfinished, but may change afterwards: the
# modification times of the source files and the way in which work is divided.
Identity = dict[str, Any]
_COMPARED = ("used", "rows", "files", "bytes")  # properties of a source that messages mention
_DIVISION = [2, BATCH_SIZE, CHUNK_BYTES]  # first: a version, to be raised when the division changes


def identify(
    config: PrepareConfig, sources: Iterable[Source], tokenizer: Tokenizer | None
) -> Identity:
    """What must be unchanged to resume an unfinished corpus, or to keep a complete one."""

    def facts(source: Source) -> dict[str, Any]:
        sizes = [(path.name, path.stat().st_size) for path in source.files]
        return {
            "asked": source.requested,
            "used": source.used,
            "passed": list(source.unavailable),
            "rows": None if source.token_ids is None else str(source.token_ids),
            "files": len(sizes),
            "bytes": sum(size for _, size in sizes),
            "listing": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        }

    unset = set() if config.eos_token else {"eos_token"}  # of earlier versions, which lacked it
    not_settings = {"out", "overwrite", "workers", "tasks", "task", "join"}
    settings = config.model_dump(mode="json", exclude=not_settings | unset)
    if tokenizer is not None and (document_tokens := document_token_fields(tokenizer)):
        settings["document"] = document_tokens
    times = [(str(path), path.stat().st_mtime_ns) for source in sources for path in source.files]
    return {
        "settings": settings | {"given_tokenizer": tokenizer.fingerprint if tokenizer else None},
        "sources": [facts(source) for source in sources],
        "seen": hashlib.sha256(json.dumps([*_DIVISION, times]).encode()).hexdigest(),
    }


def document_token_fields(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The document tokens, by field; empty if they are just an end of text before each document."""
    document_tokens = tokenizer.special_ids.document
    if document_tokens == DocumentTokens((tokenizer.eos_id,)):
        return {}
    return {name: list(ids) for name, ids in document_tokens._asdict().items()}


def holds_corpus(
    out: Path, identity: Identity, sources: Iterable[Path], *, overwrite: bool
) -> bool:
    """Whether `out` already holds the corpus with this identity; if not, it may be made there.

    FileExistsError, with the difference, for another corpus or other files. The caller holds the
    lock of `out`.
    """
    work = out / UNFINISHED
    if interrupted := (work / MANIFEST).is_file():  # killed while it was published
        publish(out)
    if (out / MANIFEST).is_file():
        made = _read(out / MANIFEST)
        difference = _difference(made, identity) or _changed_source(out / MANIFEST, sources)
        if overwrite and (difference or not interrupted):
            return False
        if difference:
            raise FileExistsError(
                f"{out}: holds another corpus ({difference}); "
                "choose another --out, or --overwrite to replace it"
            )
        return True
    if (work / JOURNAL).is_file():
        difference = _changed(_read(work / JOURNAL), identity)
        if difference and not overwrite:
            raise FileExistsError(
                f"{out}: holds another corpus, unfinished ({difference}); "
                "choose another --out, or --overwrite to start over"
            )
    elif any(path.name != UNFINISHED and path.name[0] != "." for path in out.iterdir()):
        raise FileExistsError(f"--out {out}: holds other files and no corpus; name a new folder")
    return False


def read_journal(out: Path, identity: Identity) -> Identity | None:
    """The journal of an interrupted run with this identity, if its tokenizer was written."""
    work = out / UNFINISHED
    if not (work / JOURNAL).is_file() or not (work / TOKENIZER).is_file():
        return None
    journal = _read(work / JOURNAL)
    return None if _changed(journal, identity) else journal


def write_journal(out: Path, identity: Identity, state: dict[str, Any] | None = None) -> None:
    """Record the progress of the corpus, `state`."""
    journal = {**identity, "state": state}
    journal["digest"] = manifest_digest(journal)
    files.write_json(out / UNFINISHED / JOURNAL, journal)


def start_over(out: Path, identity: Identity) -> None:
    """Replace an unfinished corpus with a new one that has only a journal."""
    _clear(out / UNFINISHED)
    (out / UNFINISHED).mkdir()
    write_journal(out, identity)


def begin_parts(out: Path, identity: Identity) -> None:
    """Start a corpus that is made in parts, unless it has been started. Holds the lock of `out`."""
    journal = out / UNFINISHED / JOURNAL
    if not journal.is_file() or _changed(_read(journal), identity):
        start_over(out, identity)


def discard(out: Path) -> None:
    """Remove an unfinished corpus, and `out` if there was nothing else in it."""
    _clear(out / UNFINISHED)
    with suppress(OSError):  # not empty, or the working directory
        out.rmdir()


def publish(out: Path) -> None:
    """Move the complete corpus from `unfinished` to `out`, replacing the one there.

    The manifest is moved last: without it there is no corpus in `out`, and while it is still in
    `unfinished`, calling this again completes the move.
    """
    work = out / UNFINISHED
    splits = files.read_json(work / MANIFEST)["splits"].values()
    names = {shard["file"] for split in splits for shard in split["shards"]}
    files.remove_temporary_files(work)
    (work / JOURNAL).unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    if (work / TOKENIZER).is_file():
        (out / ROLES).unlink(missing_ok=True)
    for name in (*names, TOKENIZER, ROLES):
        with suppress(FileNotFoundError):  # moved before a kill
            os.replace(work / name, out / name)
    for path in work.glob(f"{_PART}*/*.npy"):
        if path.name in names:
            os.replace(path, out / path.name)
    for path in _shards(out):
        if path.name not in names:  # of the corpus that is replaced
            path.unlink()
    files.sync(out)
    _clear_parts(work)
    os.replace(work / MANIFEST, out / MANIFEST)
    files.sync(out)
    work.rmdir()


def part_folder(out: Path, number: int) -> Path:
    """The folder of a part of a corpus that is made in parts. It is a corpus of its own."""
    return out / UNFINISHED / f"{_PART}{number:05d}"


def _clear(work: Path) -> None:
    """Remove the folder `unfinished`, if it exists."""
    if work.is_dir():
        _clear_parts(work)
        files.remove_temporary_files(work)
        _remove_files(work)
        work.rmdir()


def _clear_parts(work: Path) -> None:
    for part in work.glob(f"{_PART}*"):
        _clear(part / UNFINISHED)
        _remove_files(part)
        (part / MANIFEST).unlink(missing_ok=True)
        part.rmdir()


def _remove_files(folder: Path) -> None:
    for path in (*_shards(folder), *(folder / name for name in (TOKENIZER, ROLES, JOURNAL))):
        path.unlink(missing_ok=True)


def _shards(folder: Path) -> list[Path]:
    return [*folder.glob("train-*.npy"), *folder.glob("val-*.npy")]


def _read(path: Path) -> Identity:
    """A manifest or journal of a corpus. FileExistsError for another file of that name."""
    try:
        identity: Identity = files.read_json(path)
        valid = isinstance(identity["settings"], dict) and all(
            {"asked", "passed", "listing", *_COMPARED} <= source.keys()
            for source in identity["sources"]
        )
        valid &= identity.get("digest") in (None, manifest_digest(identity))
    except (ValueError, LookupError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise FileExistsError(
            f"{path}: not part of a corpus, or damaged; choose another --out, or remove the folder"
        )
    return identity


def _difference(old: Identity, new: Identity) -> str:
    """What differs between two identities, for a message; empty if nothing does."""
    found = [
        f"{name}: {old['settings'].get(name)!r} before, {value!r} now"
        for name, value in new["settings"].items()
        if old["settings"].get(name) != value
    ]
    for before, now in zip(old["sources"], new["sources"], strict=False):
        names = [name for name in _COMPARED if before[name] != now[name]]
        found += [f"{now['asked']}: {n} {before[n]!r} before, {now[n]!r} now" for n in names]
        if not names and before["listing"] != now["listing"]:
            found.append(f"{now['asked']}: other names or sizes of files")
    return "; ".join(found)


def _changed(journal: Identity, identity: Identity) -> str:
    difference = _difference(journal, identity)
    if not difference and journal.get("seen") != identity["seen"]:
        return "a source file or gptsmith itself has changed since"
    return difference


def _changed_source(manifest: Path, sources: Iterable[Path]) -> str:
    """A source file that was written after the corpus was made, for a message; or nothing."""
    made = manifest.stat().st_mtime_ns
    path = next((path for path in sources if path.stat().st_mtime_ns > made), None)
    return f"{path} has changed since" if path else ""

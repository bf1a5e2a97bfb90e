"""The folder a corpus is made in: new, unfinished, to be replaced, or not to be touched.

A corpus is made in place, where its finished shards stay when the work is interrupted. One that
is there already stays whole until the new one, made beside it, is complete.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptsmith import files

JOURNAL = "progress.json"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

# What a corpus is made from and how: {"settings": ..., "sources": [...], "seen": ...}; the last is
# a digest of the times of the source files and of how work is cut, which only an unfinished corpus
# keeps.
Identity = dict[str, Any]
_FACTS = ("used", "rows", "files", "bytes")  # about a source, to be told when they differ


def choose_folder(
    out: Path, identity: Identity, sources: Iterable[Path], *, overwrite: bool
) -> Path | None:
    """The folder to make the corpus in; None if `out` holds it already.

    FileExistsError, saying what differs, if something else is there that is not to be replaced.
    """
    if not out.resolve().name:
        raise ValueError(f"--out {out}: name a new folder")
    beside, old = _beside(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: is a file; name a folder")
    if not out.exists() and old.exists():  # killed between the two renamings of replace()
        os.replace(beside if (beside / MANIFEST).is_file() else old, out.resolve())
    if out.is_symlink() and not out.exists():
        raise FileExistsError(f"--out {out}: is a link to what is not there; name a folder")
    if (out / MANIFEST).is_file():
        made = _read(out / MANIFEST)  # before anything of another kind of folder is touched
        if old.exists():
            _remove_old(out, old)
        if overwrite:
            beside.mkdir(exist_ok=True)
            return beside
        difference = _difference(made, identity) or _newer(out, sources)
        if difference:
            raise FileExistsError(
                f"{out}: holds a corpus made otherwise ({difference}); "
                "choose another --out, or --overwrite to replace it"
            )
        (out / JOURNAL).unlink(missing_ok=True)
        return None
    if (out / JOURNAL).is_file():
        difference = _changed(_read(out / JOURNAL), identity)
        if difference and not overwrite:
            raise FileExistsError(
                f"{out}: holds an unfinished corpus made otherwise ({difference}); "
                "choose another --out, or --overwrite to begin anew"
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileExistsError(f"--out {out}: holds other files and no corpus; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    return out


def replacement(out: Path) -> Path | None:
    """The folder of a corpus that was to replace the one in `out`, if it was left unfinished."""
    beside = _beside(out)[0]
    return beside if beside.is_dir() else None


def open_journal(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """The journal of an interrupted run that is to be gone on with; else a clean folder and None.

    Reasons why alternatives were passed over are kept as they were said the first time, so that
    the manifest does not change.
    """
    files.sweep(folder)
    if (folder / JOURNAL).is_file() and (folder / TOKENIZER).is_file():
        journal: dict[str, Any] = files.read_json(folder / JOURNAL)
        if not _changed(journal, identity):
            for before, now in zip(journal["sources"], identity["sources"], strict=True):
                now["passed"] = before["passed"]
            return journal
    begin_journal(folder, identity)
    return None


def begin_journal(folder: Path, identity: Identity) -> None:
    """Nothing of a corpus in the folder but the words of what is to be made."""
    _remove_parts(folder)
    files.write_json(folder / JOURNAL, identity)


def clear(folder: Path) -> None:
    """Remove what an unfinished corpus consists of, and the folder if that was all."""
    _remove_parts(folder)
    with suppress(OSError):  # not empty, or where the user stands
        folder.rmdir()


def replace(out: Path, new: Path) -> None:
    """Put a finished folder in the place of the old one; foreign files of that one are kept."""
    out, old = out.resolve(), _beside(out)[1]
    os.replace(out, old)
    os.replace(new, out)
    files.sync(out.parent)
    _remove_old(out, old)


def _read(path: Path) -> Identity:
    """A manifest or journal of a corpus. FileExistsError for anything else of that name."""
    try:
        identity: Identity = files.read_json(path)
        known = isinstance(identity["settings"], dict) and all(
            {"asked", "passed", "listing", *_FACTS} <= source.keys()
            for source in identity["sources"]
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        known = False
    if not known:
        raise FileExistsError(
            f"{path}: not that of a corpus; choose another --out, or remove the folder"
        )
    return identity


def _difference(old: Identity, new: Identity) -> str:
    """What differs between two identities, in the user's words; empty if nothing does."""
    said = [
        f"{key}: {old['settings'].get(key)!r} there, {now!r} now"
        for key, now in new["settings"].items()
        if old["settings"].get(key) != now
    ]
    for before, now in zip(old["sources"], new["sources"], strict=False):
        keys = [key for key in _FACTS if before[key] != now[key]]
        said += [f"{now['asked']}: {key} {before[key]!r} there, {now[key]!r} now" for key in keys]
        if not keys and before["listing"] != now["listing"]:
            said.append(f"{now['asked']}: other names or sizes of files")
    return "; ".join(said)


def _changed(journal: Identity, identity: Identity) -> str:
    difference = _difference(journal, identity)
    if not difference and journal["seen"] != identity["seen"]:
        return "a source file or gptsmith itself was changed since"
    return difference


def _newer(out: Path, sources: Iterable[Path]) -> str:
    """A source file that was written after the corpus was made, if there is one."""
    made = (out / MANIFEST).stat().st_mtime_ns
    path = next((path for path in sources if path.stat().st_mtime_ns > made), None)
    return f"{path} was changed since" if path else ""


def _remove_parts(folder: Path) -> None:
    files.sweep(folder)
    for pattern in ("train-*.npy", "val-*.npy", "*.npy.partial", TOKENIZER, JOURNAL):
        for path in folder.glob(pattern):
            path.unlink()


def _beside(out: Path) -> tuple[Path, Path]:
    out = out.resolve()  # a link leads to the folder that is replaced
    return out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")


def _remove_old(out: Path, old: Path) -> None:
    (old / MANIFEST).unlink(missing_ok=True)
    _remove_parts(old)
    for path in old.iterdir():
        if not (out / path.name).exists():
            os.replace(path, out / path.name)
    shutil.rmtree(old)

"""digests.json of a run folder: the digests of the files that results depend on.

    {"format": 1,
     "files": {"model.safetensors": [DIGEST, DIGEST OF THE FILE THAT IT REPLACED], ...}}

A new digest (files.digest) is recorded before its file is replaced, next to that of the old file,
so after a kill at any moment the file matches one of the two. Digests are compared whenever a file
is opened. Runs of earlier versions have none and are read without verification.

`format` is that of the whole run folder; a run of an unknown one is not read (docs/formats.md).
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gptsmith import files

NAME = "digests.json"
FORMAT = 1  # of a run folder; absent: 1


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files durably, in their order, and record their digests."""
    for name, data in contents.items():
        with recorded(folder, name) as temporary:
            temporary.write_bytes(data)


@contextmanager
def recorded(folder: Path, name: str) -> Iterator[Path]:
    """`files.atomic_path` for folder/name, whose digest is recorded before it is renamed."""
    with files.atomic_path(folder / name) as temporary:
        yield temporary
        _record(folder, name, temporary)


def record_existing(folder: Path, name: str) -> None:
    """Record the digest of an existing file, unless it has one."""
    if name not in _read(folder):
        _record(folder, name, folder / name)


def _record(folder: Path, name: str, written: Path) -> None:
    """Record the digest of a new file next to that of the file which it replaces."""
    content, digest = _read(folder), files.digest(written)
    before = content.get(name, [])
    if before[:1] != [digest]:
        content[name] = [digest, *before[:1]]
        _write(folder, dict(sorted(content.items())))


def remove(folder: Path, names: Collection[str]) -> None:
    """Remove files, if they exist, and their digests."""
    content = _read(folder)
    kept = {name: digests for name, digests in content.items() if name not in names}
    if kept != content:
        _write(folder, kept)
    for name in names:
        (folder / name).unlink(missing_ok=True)


def check(folder: Path, name: str, remedy: str = "restore it from a copy") -> None:
    """Compare a file with its recorded digests, if it has any.

    Reads the whole file. ValueError naming it if it is damaged or missing.
    """
    path = folder / name
    recorded = _read(folder).get(name)
    while recorded is not None:
        if not path.exists():
            raise ValueError(f"{path} is missing: {remedy}")
        if files.digest(path) in recorded:
            return
        again = _read(folder).get(name)
        if again == recorded:  # else the process that trains here has just replaced the file
            raise ValueError(
                f"{path} is damaged: its sha256 is not the one in {NAME}; {remedy}, or, if you "
                f"edited the file, delete {NAME}"
            )
        recorded = again


def check_not_added(folder: Path, name: str) -> None:
    """ValueError if a file exists that is not among the recorded ones of the folder."""
    exists = (folder / name).exists()  # asked first: a digest is recorded before its file is there
    recorded = _read(folder)
    if exists and recorded and name not in recorded:
        raise ValueError(
            f"{folder / name} was added later, {NAME} has no digest of it: remove it, or, if the "
            f"run needs it, delete {NAME}"
        )


def unverified_note(folder: Path) -> str:
    """A note for the user if the run has no digests; otherwise empty."""
    if (folder / NAME).exists():
        return ""
    return f"{folder} has no {NAME} (it was made by an earlier version): read without verification"


def _write(folder: Path, content: Mapping[str, list[str]]) -> None:
    files.write_json(folder / NAME, {"format": FORMAT, "files": content})


def _read(folder: Path) -> dict[str, list[str]]:
    path = folder / NAME
    try:
        document = files.read_mapping(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{error}: damaged; without it, the run is read unverified") from None
    files.check_format(f"{folder} is a run of format", document.get("format", FORMAT), FORMAT)
    content = document.get("files")
    if not isinstance(content, dict) or not all(isinstance(d, list) for d in content.values()):
        raise ValueError(f"{path}: damaged; without it, the run is read unverified")
    return content

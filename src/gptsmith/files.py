"""Durable writes: after a kill or a power cut a file is the old one or the new one, whole.

Always the same steps: a temporary name in the same folder, fsync, os.replace, fsync of the folder
(without the last, a power cut may lose the rename although the data is on disk).
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

# Ours (.model.tmp-0a1b2c3d.json) and those that safetensors makes inside its own save (.tmpaB3dE6).
_TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]{8}(\.\w+)?|\.tmp\w{6}")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path next to `path`; fsynced and renamed to `path` on success, else removed.

    The temporary name keeps the suffix, because np.save and matplotlib read the format from it.
    An OSError (disk full, no permission) names `path`, not the temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        ours = (None, str(temporary))
        if isinstance(error, OSError) and error.errno is not None and error.filename in ours:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder next to `path`; fsynced and renamed to `path` on success, else removed.

    Leftovers of an earlier attempt that was killed are removed. An OSError (disk full, no
    permission) names `path`. FileExistsError if `path` exists, unless it is an empty folder.
    """
    path = Path(path)
    refuse_occupied(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{path.name}.tmp-"
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        if left.is_dir() and _TEMPORARY.fullmatch(left.name):
            with suppress(ValueError), lock(left, ""):  # locked: still being written
                shutil.rmtree(left)
    temporary = path.with_name(stem + secrets.token_hex(4))
    try:
        temporary.mkdir()
        with lock(temporary, ""):
            yield temporary
            for found in (temporary, *temporary.rglob("*")):
                sync(found)
            refuse_occupied(path)
            os.replace(temporary, path)  # onto an empty folder, too
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            failed = Path(str(error.filename or temporary))
            if failed.is_relative_to(temporary):
                raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def refuse_occupied(path: Path) -> None:
    """FileExistsError unless a folder can be created at `path` without losing anything."""
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise FileExistsError(
            f"{above} is a file, so {path} cannot be created: choose another --out"
        )
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty: choose another --out")
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists and is not a folder: choose another --out")


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8, line endings unchanged."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, obj: Any) -> None:
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_text(path: str | Path) -> str:
    """UTF-8, line endings unchanged. ValueError naming file and byte if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def read_json(path: str | Path) -> Any:
    """The parsed file. ValueError as from `parse_json`."""
    return parse_json(Path(path).read_bytes(), path)


def parse_json(text: str | bytes, path: str | Path) -> Any:
    """ValueError naming file, line and column if it is not JSON or nested too deeply."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON (nested too deeply)") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path}: not JSON ({error})") from None


def _not_utf8(path: str | Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path}, byte {error.start}: not UTF-8 ({error.reason})")


def mapping(content: Any, path: str | Path) -> dict[str, Any]:
    """`content`, checked to be a mapping. ValueError naming the file."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of names to values")
    return content


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of the file's bytes, read in chunks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: str | Path) -> None:
    """Remove temporary files of killed writes from `folder`, whose lock the caller holds."""
    for path in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def lock(path: Path, remedy: str) -> ExitStack:
    """An exclusive flock on a file or folder, held until `close`, the end of a `with`, or the end
    of the process.

    A file is created if needed and contains our process id. ValueError naming the process that
    holds the lock, if it is known.
    """
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    held = ExitStack()
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = "" if folder else os.read(descriptor, 20).decode().strip()
        held.close()
        who = f"process {owner}" if owner else "another process"
        raise ValueError(
            f"{path if folder else path.parent} is in use by {who}: "
            f"wait for it or stop it, {remedy}"
        ) from None
    if not folder:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return held

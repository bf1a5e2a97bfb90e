"""Durable, atomic writes: after a kill or power failure a file is either the old or the new one.

Always the same steps: a temporary name in the same folder, fsync, os.replace, fsync of the folder
(without the last, a power cut may lose the rename although the data is on disk).
"""

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Ours (.model.tmp-0a1b2c3d.json) and those that safetensors makes inside its own save (.tmpaB3dE6).
_TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]{8}(\.\w+)?|\.tmp\w{6}")
_CHUNK = 1 << 24  # bytes that a thread hashes at a time
_CHUNKED = "sha256/16MiB:"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path next to `path`; fsynced and renamed to `path` on success, else removed.

    The file is created empty. Its name keeps the suffix, from which np.save and matplotlib take the
    format. Leftovers of an earlier attempt that was killed are removed. An OSError (disk full, no
    permission) names `path`, not the temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(4)}{path.suffix}")
    with naming(path, temporary):
        try:
            _remove_leftovers(path)
            with temporary.open("xb") as file:
                with suppress(OSError):  # a file system may lack flock
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` that no living process has locked."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.tmp-*"):
        if _TEMPORARY.fullmatch(left.name) and left.suffix == path.suffix and left.is_file():
            with suppress(OSError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder next to `path`; fsynced and renamed to `path` on success, else removed.

    Leftovers of an earlier attempt that was killed are removed. An OSError (disk full, no
    permission) names `path`. FileExistsError if `path` exists, unless it is an empty folder.
    """
    path = Path(path)
    check_creatable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{path.name}.tmp-"
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        if left.is_dir() and _TEMPORARY.fullmatch(left.name):
            with suppress(ValueError), lock(left, ""):  # locked: still being written
                shutil.rmtree(left)
    temporary = path.with_name(stem + secrets.token_hex(4))
    with naming(path, temporary):
        try:
            temporary.mkdir()
            with lock(temporary, ""):
                yield temporary
                for found in (temporary, *temporary.rglob("*")):
                    sync(found)
                check_creatable(path)
                os.replace(temporary, path)  # onto an empty folder, too
            try:
                sync(path.parent)
            except OSError:  # the rename may be lost: undo it, so that the next attempt can write
                with suppress(OSError):
                    os.replace(path, temporary)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def naming(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Make OSErrors of the block that name no file (a failed write, fsync or lock) name `path`.

    The same holds for errors that name `temporary`, something in it, or the folder of both.
    """
    try:
        yield
    except OSError as error:
        names_another = error.filename is not None
        if temporary is not None and names_another:
            failed = Path(str(error.filename))
            names_another = failed != temporary.parent and not failed.is_relative_to(temporary)
        if error.errno is None or names_another:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_safetensors(path: str | Path, function: Callable[[], T]) -> T:
    """The result of `function`, which opens `path` by safetensors; OSErrors tell the cause.

    The library calls each file missing that it fails to open, and torch, which opens it again,
    raises RuntimeError and gives up when a signal interrupts it.
    """
    while True:
        try:
            return function()
        except FileNotFoundError as error:
            if error.errno is not None or not os.path.exists(path):
                raise
            number = errno.EIO
        except RuntimeError as error:
            found = re.fullmatch(r"unable to open file <.*> .*\((\d+)\)", str(error), re.DOTALL)
            if found is None:
                raise
            number = int(found[1])
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), str(path))


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if needed; FileExistsError naming what is in the way."""
    lowest_existing_folder(path)
    path.mkdir(parents=True, exist_ok=True)


def check_creatable(path: Path) -> None:
    """An OSError unless `atomic_folder` can create a folder at `path` without losing anything."""
    lowest = lowest_existing_folder(path)
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link: give the folder that it leads to as --out")
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty: choose another --out")
        if _is_mount_point(path):  # rename(2) would fail, after all the work
            raise FileExistsError(
                f"{path} is a mount point, which the finished folder cannot replace: give a new "
                f"folder in it, --out {path / 'NAME'}"
            )
    above = lowest.parent if path.is_dir() else lowest
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, f"not writable, so {path} cannot be created", str(above)
        )


def check_not_read(out: Path, sources: Iterable[str | Path | None]) -> None:
    """ValueError if a file to write is one of those that are read: files, or patterns of them."""
    for source in (str(source) for source in sources if source is not None):
        for path in (source, *glob.glob(source, recursive=True)):
            if out.exists() and os.path.exists(path) and os.path.samefile(out, path):
                raise ValueError(f"--out {out} is a file that is read: name another one")


def lowest_existing_folder(path: Path) -> Path:
    """The lowest existing folder at or above `path`. FileExistsError if something else is there."""
    absolute = path.absolute()
    found = next(p for p in (absolute, *absolute.parents) if os.path.lexists(p))
    if not found.is_dir():
        what = "a link that leads nowhere" if found.is_symlink() else "a file"
        problem = f"{found} is {what}, so {path} cannot be created"
        if found == absolute:
            problem = f"{path} is {what}"
        raise FileExistsError(f"{problem}: choose another --out")
    return found


def _is_mount_point(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a bind mount within one file system, which ismount does not see
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return False
    points = (line.split(" ")[4] for line in table.splitlines())
    escaped = (re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), p) for p in points)
    return str(path.resolve()) in escaped


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8, line endings unchanged."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, obj: Any) -> None:
    write_bytes(path, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode()


def write_figure(path: str | Path, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure. options: of savefig; by default the suffix gives the format.

    It is drawn in memory, because matplotlib's writers lose the cause of a disk error.
    """
    path, image = Path(path), io.BytesIO()
    figure.savefig(image, **{"format": path.suffix.removeprefix("."), **options})
    write_bytes(path, image.getvalue())


def read_text(path: str | Path) -> str:
    """UTF-8, line endings unchanged. ValueError naming file and byte if it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def read_bytes(path: str | Path) -> bytes:
    """The whole file; every OSError names it."""
    with naming(path):
        return Path(path).read_bytes()


def read_standard_input(place: str) -> str:
    """What is piped to a command, without its final newline. place: begins the error."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: standard input is not UTF-8 ({error.reason})") from None


def read_json(path: str | Path) -> Any:
    """The parsed file. ValueError as from `parse_json`."""
    return parse_json(read_bytes(path), path)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """`read_json` of a file that holds a JSON object; ValueError naming the file for another."""
    return check_mapping(read_json(path), path)


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


def check_mapping(content: Any, path: str | Path) -> dict[str, Any]:
    """`content`, checked to be a mapping. ValueError naming the file."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of names to values")
    return content


def check_format(what: str, found: object, known: int, remedy: str = "") -> None:
    """ValueError unless `found` is the version of a format that this gptsmith reads.

    what: what has it, before the number. remedy: besides a newer gptsmith.
    """
    if type(found) is not int or found < 1:
        problem = f"{what} {found!r:.20}, which is not a version number: damaged or edited"
        raise ValueError("; ".join(filter(None, [problem, remedy])))
    if found != known:
        problem = f"{what} {found}, this gptsmith reads format {known}: install a newer gptsmith"
        raise ValueError(", or ".join(filter(None, [problem, remedy])))


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of the file's bytes, read in chunks."""
    with naming(path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: str | Path) -> str:
    """The digest under which a file is recorded: its sha256 in hexadecimal.

    For a file over 16 MiB it is `sha256/16MiB:` followed by the sha256 of the concatenated sha256
    digests of its 16 MiB parts, which are hashed in threads: 0.2 s for 500 MB on two cores.
    """
    with naming(path), Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        starts = range(0, max(size, 1), _CHUNK)
        if len(starts) == 1:
            return hashlib.file_digest(file, "sha256").hexdigest()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            parts = threads.map(lambda start: _hash_part(file.fileno(), start), starts)
            return _CHUNKED + hashlib.sha256(b"".join(parts)).hexdigest()


def _hash_part(descriptor: int, start: int) -> bytes:
    """sha256 of the _CHUNK bytes at `start`. hashlib and pread release the interpreter's lock."""
    hashed, end = hashlib.sha256(), start + _CHUNK
    while start < end and (data := os.pread(descriptor, min(1 << 20, end - start), start)):
        hashed.update(data)
        start += len(data)
    return hashed.digest()


def has_digest(path: str | Path, recorded: str) -> bool:
    """Whether the file matches a recorded result of `digest` or `sha256`."""
    return recorded == (digest if recorded.startswith(_CHUNKED) else sha256)(path)


def sync(path: str | Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(folder: str | Path) -> None:
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
    with ExitStack() as held:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        held.callback(os.close, descriptor)
        try:
            with naming(path):  # a file system may lack flock
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = "" if folder else os.read(descriptor, 20).decode(errors="replace").strip()
            who = f"process {owner}" if owner else "another process"
            raise ValueError(
                f"{path if folder else path.parent} is in use by {who}: "
                f"wait for it or stop it, {remedy}"
            ) from None
        if not folder:
            with naming(path):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
        return held.pop_all()

"""Downloads over HTTP: complete and verified, or not at all; interrupted ones are resumed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from gptsmith import files
from gptsmith.progress import WorkProgress

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a retry, if the last attempt made no progress
_TIMEOUT = httpx.Timeout(30, connect=10)


class RemoteFile(NamedTuple):
    """A file to download; None where its size or sha256 is not published."""

    name: str
    size: int | None = None
    sha256: str | None = None


def fetch(url: str, path: Path, remote: RemoteFile) -> None:
    """Download `url` to `path`, complete and verified. A file that is already there is verified.

    An interrupted download leaves NAME.part, which the next call resumes. Raises ConnectionError if
    the server cannot be reached or keeps failing, ValueError if the file is not the published one.
    """
    if path.is_file():
        return verify(path, remote, "delete it and run this again")
    part = path.with_name(f"{path.name}.part")
    try:
        _receive(url, part, remote)
        verify(part, remote, "it is deleted, run this again")
    except ValueError:
        part.unlink(missing_ok=True)
        raise
    files.sync(part)
    os.replace(part, path)
    files.sync(path.parent)


def _receive(url: str, part: Path, remote: RemoteFile) -> None:
    """Requests until `part` is complete, with pauses between those that make no progress."""
    reached, pauses = False, iter(_PAUSES)
    while True:
        before = _size(part)
        try:
            return _request(url, part, remote)
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            why = f"{url} answers {code} {error.response.reason_phrase}".strip()
            retry = code in (408, 429) or code >= 500
        except httpx.RequestError as error:
            why = str(error) or type(error).__name__
            retry = reached or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if not retry:  # without network, an error at once
            raise ConnectionError(why) from None
        reached = True
        if _size(part) > before:
            pauses = iter(_PAUSES)
        pause = next(pauses, None)
        if pause is None:
            raise ConnectionError(f"gave up after {len(_PAUSES) + 1} tries, the last: {why}")
        time.sleep(pause)


def _request(url: str, part: Path, remote: RemoteFile) -> None:
    """One request for what `part` lacks."""
    # A range past the end is an error, so the last byte is requested again.
    start = max(_size(part) - 1, 0)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with httpx.stream(
        "GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
    ) as answer:
        if answer.status_code == 416:
            raise ValueError(f"{url} is shorter than {part}: it has changed, run this again")
        answer.raise_for_status()
        if answer.status_code == 200:  # the whole file, requested or not
            start = 0
        length = answer.headers.get("Content-Length", "")
        size = start + int(length) if length.isdecimal() else remote.size or 0
        if remote.size not in (None, size):
            raise ValueError(
                f"{url} has {size:,} bytes, expected {remote.size:,}: it is not the published file"
            )
        title = f"fetching {remote.name}"
        with (
            part.open("r+b" if start else "wb") as file,
            WorkProgress(title, size, percent=True) as shown,
        ):
            file.seek(start)
            for block in answer.iter_raw():
                file.write(block)
                shown.update(file.tell(), f"{file.tell() / 1e6:,.1f} of {size / 1e6:,.1f} MB")
            file.truncate()


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def verify(path: Path, remote: RemoteFile, remedy: str) -> None:
    """ValueError unless the file has the published size and sha256."""
    if remote.size is not None and remote.size != (size := path.stat().st_size):
        wrong = f"has {size:,} bytes instead of {remote.size:,}"
    elif remote.sha256 is not None and remote.sha256 != (found := files.sha256(path)):
        wrong = f"has sha256 {found[:16]}... instead of {remote.sha256[:16]}..."
    else:
        return
    raise ValueError(f"{path} {wrong}: {remedy}")


@contextmanager
def cache(*names: str) -> Iterator[Path]:
    """A folder for downloads, locked. FileNotFoundError, with the remedy, if it cannot be made."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root.joinpath("gptsmith", *names)
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no folder for downloads ({error}): set XDG_CACHE_HOME to one"
        ) from None
    with files.lock(folder, "then run this again"):
        yield folder

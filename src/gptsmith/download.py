"""Files from the network: whole and verified, or not at all.

What lies there already, fetched earlier or put there by hand, is verified and used. A transfer that
breaks off goes on where it was, in this call or the next.
"""

import base64
import glob
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gptsmith import files

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a try that follows one without progress
_TIMEOUT = httpx.Timeout(30, connect=10)

Report = Callable[[str, int, int], None]  # name of the file, bytes there, bytes in all


class Wanted(NamedTuple):
    """A file to fetch; None where its size or sha256 was never published."""

    name: str
    size: int | None = None
    sha256: str | None = None


def have(url: str, path: Path, wanted: Wanted, report: Report) -> None:
    """What lies at `path` is verified; if nothing does, it is fetched. Errors as of `fetch`."""
    if path.is_file():
        verify(path, wanted, "delete it and run this again")
    else:
        fetch(url, path, wanted, report)


def fetch(url: str, path: Path, wanted: Wanted, report: Report) -> None:
    """Make `path` of what is at `url`: whole and verified, or not at all.

    What a broken transfer left stands beside it (NAME.*.part), and the next one goes on from there.
    Raises ConnectionError when the server is out of reach or gives up, ValueError when it has
    something else than what is wanted.
    """
    reached, pauses = False, iter(_PAUSES)
    while True:
        there = _size(_part(path))
        try:
            return _transfer(url, path, wanted, report)
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            why = f"{url} answers {code} {error.response.reason_phrase}".strip()
            again = code in (408, 429) or code >= 500
        except httpx.RequestError as error:
            why = str(error) or type(error).__name__
            again = reached or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if not again:  # without network the user should not wait to be told
            raise ConnectionError(why) from None
        reached = True
        if _size(_part(path)) > there:
            pauses = iter(_PAUSES)
        pause = next(pauses, None)
        if pause is None:
            raise ConnectionError(f"gave up after {len(_PAUSES) + 1} tries, the last: {why}")
        time.sleep(pause)


def _transfer(url: str, path: Path, wanted: Wanted, report: Report) -> None:
    """One request: for what is missing of the file, if a part of the same version is there."""
    part = _part(path)
    # A range behind the end is an error, so a part that may be whole is asked for its last byte.
    start = max(_size(part) - 1, 0)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with httpx.stream(
        "GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
    ) as answer:
        code, etag = answer.status_code, answer.headers.get("ETag", "")
        target = path.with_name(f"{path.name}.{hashlib.sha256(etag.encode()).hexdigest()[:8]}.part")
        if not etag or etag.startswith("W/"):  # no telling one version from another
            target = path.with_name(f"{path.name}.part")
        follows = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if part and start and (code == 416 or (code == 206 and not (follows and target == part))):
            part.unlink()  # of another version than the server has now
            return _transfer(url, path, wanted, report)
        answer.raise_for_status()
        if code == 200:  # the whole, asked for or not
            start = 0
            if part and part != target:
                part.unlink()
        _receive(answer, target, start, wanted, report)
    verify(target, wanted, "what came is deleted, run this again")
    os.replace(target, path)
    files.sync(path.parent)


def _receive(
    answer: httpx.Response, target: Path, start: int, wanted: Wanted, report: Report
) -> None:
    """Write the answer's body into `target` from byte `start` on."""
    length = answer.headers.get("Content-Length", "")
    size = start + int(length) if length.isdecimal() else wanted.size
    if size is None:
        raise ValueError(f"{answer.url}: the server does not say how long it is; fetch it by hand")
    if wanted.size not in (None, size):
        raise ValueError(
            f"{answer.url} has {size} bytes, expected {wanted.size}: it is not the file that was "
            "published"
        )
    with target.open("r+b" if start else "wb") as file:
        file.truncate(start)
        file.seek(start)
        for block in answer.iter_raw():
            if file.tell() + len(block) > size:
                raise ValueError(f"{answer.url} sends more than the {size} bytes it promised")
            file.write(block)
            report(wanted.name, file.tell(), size)
        if file.tell() < size:  # no Content-Length that httpx would hold it to
            raise httpx.RemoteProtocolError(f"{answer.url} ended at {file.tell()} of {size} bytes")
    files.sync(target)
    # of the whole file: what Azure calls it, and, where all was sent, the standard's name
    digest = answer.headers.get("x-ms-blob-content-md5")
    digest = digest or (not start and answer.headers.get("Content-MD5"))
    if digest:
        with target.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").digest()
        if base64.b64encode(md5).decode() != digest:
            target.unlink()
            raise ValueError(
                f"{answer.url} does not have the MD5 that it announced: run this again"
            )


def _part(path: Path) -> Path | None:
    """What a broken transfer left: NAME.VERSION.part, VERSION the start of the ETag's sha256."""
    return next(iter(sorted(path.parent.glob(f"{glob.escape(path.name)}.????????.part"))), None)


def _size(part: Path | None) -> int:
    return part.stat().st_size if part else 0


def verify(path: Path, wanted: Wanted, remedy: str) -> None:
    """ValueError unless the file has the size and sha256 that are known of it."""
    if wanted.size is not None and wanted.size != (size := path.stat().st_size):
        wrong = f"has {size:,} bytes instead of {wanted.size:,}"
    elif wanted.sha256 is not None and wanted.sha256 != (found := files.sha256(path)):
        wrong = f"has sha256 {found[:16]}... instead of {wanted.sha256[:16]}..."
    else:
        return
    if path.suffix == ".part":
        path.unlink()
    raise ValueError(f"{path} {wrong}: {remedy}")


@contextmanager
def cache(*names: str) -> Iterator[tuple[Path, Report]]:
    """A folder for fetched files, locked, and what shows how far a transfer is.

    FileNotFoundError, with the remedy, if there can be none.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root.joinpath("gptsmith", *names)
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"nowhere to keep downloads ({error}): set XDG_CACHE_HOME to a folder"
        ) from None
    with files.lock(folder, "then run this again"), progress() as report:
        yield folder, report


@contextmanager
def progress() -> Iterator[Report]:
    """A bar per file on a terminal, elsewhere a line per file and every ten seconds."""
    console = Console(stderr=True, highlight=False)
    bars: dict[str, TaskID] = {}
    last = 0.0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:

        def report(name: str, there: int, size: int) -> None:
            nonlocal last
            if name not in bars or (not console.is_terminal and time.monotonic() - last > 10):
                last = time.monotonic()
                if not console.is_terminal:
                    console.print(f"fetching {name}: {there / 1e6:,.1f} of {size / 1e6:,.1f} MB")
            if name not in bars:
                bars[name] = progress.add_task(name, total=size)
            progress.update(bars[name], completed=there)

        yield report

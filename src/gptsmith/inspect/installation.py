"""What gptsmith finds around it: disk, data, network, optional packages (`gptsmith doctor`)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gptsmith import files
from gptsmith.inspect.check import Check, State, first_line

EXTRAS = {
    "hub": "data sets and models of the Hugging Face Hub",
    "track": "TensorBoard, Weights & Biases, MLflow and Trackio",
    "gguf": "files for llama.cpp and Ollama",
    "serve": "the chat page, the API and constrained generation",
    "scale": "preparing a corpus with datatrove or Ray",
    "eval": "lm-evaluation-harness, ROUGE and BLEU",
}
_GIB = 2**30


def python_checks() -> Iterator[Check]:
    yield Check(
        "gptsmith", "ok", f"{_version('gptsmith') or 'not installed'}, {Path(__file__).parents[1]}"
    )
    yield Check("Python", "ok", f"{platform.python_version()}, {sys.executable}")


# --- disk and network ----------------------------------------------------------------------------


def file_checks(folder: Path) -> Iterator[Check]:
    """Free space, and whether a file can be written as gptsmith writes all of its files."""
    there = files.lowest_existing_folder(folder)
    usage = shutil.disk_usage(there)
    state: State = "ok" if usage.free >= _GIB else "problem"
    remedy = (
        "" if state == "ok" else "another --out; checkpoints of a model take 12 bytes a parameter"
    )
    found = f"{usage.free / _GIB:,.1f} of {usage.total / _GIB:,.1f} GiB free in {there}"
    yield Check("disk", state, found, remedy)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".gptsmith-doctor-") as scratch:
            for text in ("old", "new"):
                files.write_text(Path(scratch, "file"), text)
            locks = _has_locks(Path(scratch, "lock"))
    except OSError as error:
        found = f"{there}: {error.strerror or error}"
        yield Check("files", "problem", found, "give a folder on another file system as --out")
        return
    if locks:
        yield Check("files", "ok", "can be made durable (fsync), renamed and locked (flock)")
        return
    found = "the file system has no locks (flock): two commands could write one run at a time"
    yield Check("files", "problem", found, "give a folder on another file system as --out")


def _has_locks(path: Path) -> bool:
    try:
        with files.lock(path, ""), files.lock(path, ""):
            return False
    except ValueError:  # the second one is refused
        return True
    except OSError:
        return False


def data_checks() -> Iterator[Check]:
    if folder := os.environ.get("GPTSMITH_DATA"):
        name = "GPTSMITH_DATA"
        if Path(folder).is_dir():
            yield Check(name, "ok", f"{folder}: corpora and questions are read from there")
        else:
            yield Check(
                name, "problem", f"{folder} is not a folder", f"unset {name}, or correct it"
            )


def hub_check() -> Check:
    name = "Hub"
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        return Check(name, "missing", "huggingface-hub is not installed", _install("hub"))
    import httpx

    try:
        httpx.head(ENDPOINT, timeout=5)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found = f"{ENDPOINT} cannot be reached: {first_line(error)}"
        remedy = (
            "put the files into a folder and set GPTSMITH_DATA to it; HTTPS_PROXY names a proxy"
        )
        return Check(name, "missing", found, remedy)
    return Check(name, "ok", f"{ENDPOINT} can be reached")


# --- optional packages ---------------------------------------------------------------------------


def extra_checks() -> Iterator[Check]:
    required = required_by_extras()
    for extra, use in EXTRAS.items():
        if extra not in required:  # of an earlier version's metadata
            continue
        installed = {package: _version(package) for package in required[extra]}
        found = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
        lacking = [name for name, version in installed.items() if version is None]
        name = f"extra {extra}"
        if lacking:
            yield Check(name, "missing", f"{use}: without {', '.join(lacking)}", _install(extra))
        else:
            yield Check(name, "ok", f"{use}: {found}")


def required_by_extras() -> dict[str, list[str]]:
    """The packages of each extra, from the metadata of the installed gptsmith."""
    try:
        requirements = importlib.metadata.requires("gptsmith") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return {}
    packages = defaultdict[str, list[str]](list)
    for requirement in requirements:
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement):
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None
            packages[extra[1]].append(name[0])
    return dict(packages)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(extra: str) -> str:
    return f"pip install 'gptsmith[{extra}]'"

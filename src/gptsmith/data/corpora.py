"""Corpora by name, and data sets of the Hugging Face Hub.

A named corpus is looked for in $GPTSMITH_DATA first, so that a machine without network can have
it; then on the Hub, read as a stream. What cannot be had says which files to put where.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.data.documents import Document, Source, document, row_documents
from gptsmith.data.options import ReadOptions
from gptsmith.data.paths import UnavailableError
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import Row
from gptsmith.data.stdlib import pycode, pydocs
from gptsmith.data.text_files import text_documents, text_lines

_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
_SHAKESPEARE_SIZE = 1_115_394
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class HubName(NamedTuple):
    """OWNER/NAME[:CONFIG[:SPLIT]] on the Hub."""

    name: str
    config: str | None = None
    split: str = "train"


# Corpora that lie on the Hub, and the folder under $GPTSMITH_DATA that may hold their files.
_ON_HUB = {
    "wikipedia": HubName("wikimedia/wikipedia", "20231101.en"),
    "openwebtext": HubName("Skylion007/openwebtext"),
    "fineweb-edu": HubName("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
_WIKITEXT = {
    "wikitext-2": HubName("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext-2-raw": HubName("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": HubName("Salesforce/wikitext", "wikitext-103-v1"),
    "wikitext-103-raw": HubName("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
NAMES = ("pydocs", "pycode", "shakespeare", "wikitext", *_WIKITEXT, *_ON_HUB)

FolderSource = Callable[[Path, str], Source]


def open_named(
    name: str, options: ReadOptions, report: ReadReport, open_folder: FolderSource
) -> Source:
    """The corpus called `name`; `open_folder` reads a local folder of files."""
    if name in ("pydocs", "pycode"):
        import platform

        corpus = {"pydocs": pydocs, "pycode": pycode}[name]
        return Source(f"{name} (Python {platform.python_version()})", corpus)
    if name == "shakespeare":
        path = _shakespeare()
        return Source(name, partial(text_documents, path, options, report), (path,))
    if name == "wikitext" or name in _WIKITEXT:
        return _wikitext("wikitext-2" if name == "wikitext" else name, options, report)
    folder = _data_folder(name)
    if folder is not None and folder.is_dir():
        source = open_folder(folder, name)
    else:
        remedy = _put(f"{name}/*.parquet (or .jsonl, .txt ...)")
        source = open_hub(_ON_HUB[name], options, report, remedy)
    if name == "fineweb-edu":
        return Source(source.used, source.documents, source.files, first_shard=True)
    return source


def _data_folder(*parts: str) -> Path | None:
    root = os.environ.get("GPTSMITH_DATA")
    return Path(root, *parts) if root else None


# --- tiny Shakespeare ----------------------------------------------------------------------------


def _shakespeare() -> Path:
    """40,000 lines of Shakespeare (Karpathy, char-rnn): the user's copy, or one fetched once."""
    local = _data_folder("tinyshakespeare", "input.txt")
    if local is not None and local.is_file():
        return local
    from gptsmith import download  # httpx with it, 40 ms, for this alone

    wanted = download.Wanted("tiny Shakespeare", _SHAKESPEARE_SIZE, _SHAKESPEARE_SHA256)
    try:
        with download.cache("tinyshakespeare") as (folder, report):
            path = folder / "input.txt"
            download.fetch(_SHAKESPEARE, path, wanted, report)
    except ConnectionError as error:
        raise UnavailableError(
            f"shakespeare: cannot be fetched ({error}); put {_SHAKESPEARE} into "
            f"{local or '$GPTSMITH_DATA/tinyshakespeare/input.txt'}"
        ) from None
    except FileNotFoundError as error:
        raise UnavailableError(f"shakespeare: {error}") from None
    except ValueError as error:  # damaged, which is told and not passed over
        raise ValueError(f"shakespeare: {error}") from None
    return path


# --- WikiText ------------------------------------------------------------------------------------

# " = Title = " begins an article; its sections have " = = Title = = ".
_TITLE = re.compile(r" = (?!= ).*(?<! =) = \n?")


def _wikitext(name: str, options: ReadOptions, report: ReadReport) -> Source:
    """Merity et al. 2016 (arXiv:1609.07843); it validates on its own validation split."""
    folder = _data_folder(name)
    if folder is not None and (folder / "train.txt").is_file():
        train, valid = folder / "train.txt", folder / "valid.txt"
        if not valid.is_file():
            raise UnavailableError(f"{valid}: missing beside {train}")
        return Source(
            name,
            lambda: articles(text_lines(train, report), str(train)),
            (train,),
            validation=lambda: articles(text_lines(valid, report), str(valid)),
        )
    hub = _WIKITEXT[name]
    revision = hub_revision(hub, _put(f"{name}/train.txt and {name}/valid.txt"))

    def read(split: str) -> Iterator[Document]:
        rows = hub_rows(hub._replace(split=split), revision)
        # the Hub's rows are the lines of the original files, blank ones emptied
        return articles((row["text"] or " \n" for _, row in rows), f"{hub.name}:{split}")

    return Source(
        f"{name} (Hub {hub.name}@{revision})",
        partial(read, "train"),
        validation=partial(read, "validation"),
    )


def articles(lines: Iterable[str], place: str) -> Iterator[Document]:
    """Lines of a WikiText file joined to articles; together they are the whole file."""
    report, number = ReadReport(), 0
    article: list[str] = []
    blank = True  # a title stands between blank lines; a line of mathematics may look like one
    for line in lines:
        if blank and _TITLE.fullmatch(line) and any(one.strip() for one in article):
            number += 1
            yield from document(f"{place}, article {number}", "".join(article), report)
            article = []
        article.append(line)
        blank = not line.strip()
    if any(one.strip() for one in article):
        yield from document(f"{place}, article {number + 1}", "".join(article), report)


# --- the Hub -------------------------------------------------------------------------------------


def open_hub(hub: HubName, options: ReadOptions, report: ReadReport, remedy: str) -> Source:
    """A data set of the Hub, streamed; its state (commit) is recorded and read again.

    remedy: what to do where the Hub cannot be reached.
    """
    revision = hub_revision(hub, remedy)

    def read() -> Iterator[Document]:
        return row_documents(hub_rows(hub, revision), options, report)

    shown = ":".join(filter(None, hub))
    return Source(f"Hub {shown}@{revision}", read)


def _put(wanted: str) -> str:
    return f"without network, put {wanted} into a folder and set GPTSMITH_DATA to it"


def hub_revision(hub: HubName, remedy: str) -> str:
    """The commit that the Hub holds now; UnavailableError, saying what to do instead."""
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
    except ImportError:
        raise UnavailableError(
            f"{hub.name}: the Hub needs `pip install 'gptsmith[hub]'`; {remedy}"
        ) from None
    try:
        # datasets itself would try for half a minute before it says that there is no network
        return str(HfApi().dataset_info(hub.name, timeout=10).sha)
    except Exception as error:  # of requests, httpx or httpx2: each version has its own
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"{hub.name}: not to be had from the Hub ({why}); {remedy}"
        ) from None


def hub_rows(hub: HubName, revision: str | None) -> Iterator[Row]:
    """The rows of one split, read as a stream. ConnectionError if it breaks on the way."""
    import datasets

    rows: Iterable[dict[str, Any]] = datasets.load_dataset(
        hub.name, hub.config, split=hub.split, revision=revision, streaming=True
    )
    try:
        for number, row in enumerate(rows, 1):
            yield Row(f"{hub.name}, row {number}", row)
    except Exception as error:
        raise ConnectionError(
            f"{hub.name}: the Hub broke off ({error!r}); run the same command again, it goes on"
        ) from None

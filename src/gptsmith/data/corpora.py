"""Named corpora: pydocs, shakespeare, wikitext-2, fineweb-edu ...

A named corpus is looked up in $GPTSMITH_DATA first, which works without a network, and then on the
Hugging Face Hub. If neither has it, the error says which files to put where.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from gptsmith.data.documents import Document, Source, document
from gptsmith.data.hub import HubName, hub_revision, hub_rows, open_hub
from gptsmith.data.options import ReadOptions
from gptsmith.data.paths import UnavailableError
from gptsmith.data.report import ReadReport
from gptsmith.data.stdlib import pycode, pydocs
from gptsmith.data.text_files import text_documents, text_lines

_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
_SHAKESPEARE_SIZE = 1_115_394
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# Corpora on the Hub. Their files may also be in a folder of the same name in $GPTSMITH_DATA.
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

FolderSource = Callable[[Path, str, ReadOptions, ReadReport], Source]


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
        return _wikitext("wikitext-2" if name == "wikitext" else name, report)
    folder = _data_folder(name)
    if folder is not None and folder.is_dir():
        source = open_folder(folder, name, options, report)
    else:
        remedy = _offline_remedy(f"{name}/*.parquet (or .jsonl, .txt ...)")
        source = open_hub(_ON_HUB[name], options, report, remedy)
    if name == "fineweb-edu":
        return dataclasses.replace(source, first_shard=True)
    return source


def _data_folder(*parts: str) -> Path | None:
    """A path in $GPTSMITH_DATA, if that is set."""
    root = os.environ.get("GPTSMITH_DATA")
    return Path(root, *parts) if root else None


def _offline_remedy(wanted: str) -> str:
    return f"without network, put {wanted} into a folder and set GPTSMITH_DATA to it"


# --- tiny Shakespeare ----------------------------------------------------------------------------


def _shakespeare() -> Path:
    """40,000 lines of Shakespeare (Karpathy, char-rnn): a local copy, or downloaded once."""
    local = _data_folder("tinyshakespeare", "input.txt")
    if local is not None and local.is_file():
        return local
    from gptsmith import download  # imports httpx: 40 ms, for this corpus alone

    wanted = download.RemoteFile("tiny Shakespeare", _SHAKESPEARE_SIZE, _SHAKESPEARE_SHA256)
    try:
        with download.cache("tinyshakespeare") as folder:
            path = folder / "input.txt"
            download.fetch(_SHAKESPEARE, path, wanted)
    except (ConnectionError, FileNotFoundError) as error:
        raise UnavailableError(
            f"shakespeare: cannot be downloaded ({error}); put {_SHAKESPEARE} into "
            f"{local or '$GPTSMITH_DATA/tinyshakespeare/input.txt'}"
        ) from None
    except ValueError as error:  # damaged: an error, not a reason to try the next alternative
        raise ValueError(f"shakespeare: {error}") from None
    return path


# --- WikiText ------------------------------------------------------------------------------------

# " = Title = " begins an article; its sections have " = = Title = = ".
_TITLE = re.compile(r" = (?!= ).*(?<! =) = \n?")


def _wikitext(name: str, report: ReadReport) -> Source:
    """Merity et al. 2016 (arXiv:1609.07843), with its own validation split."""
    folder = _data_folder(name)
    if folder is not None and (folder / "train.txt").is_file():
        train, valid = folder / "train.txt", folder / "valid.txt"
        if not valid.is_file():
            raise UnavailableError(f"{valid}: missing next to {train}")
        val = Source(name, lambda: articles(text_lines(valid, report), str(valid)))
        return Source(
            name,
            lambda: articles(text_lines(train, report), str(train)),
            (train,),
            validation=val,
        )
    hub = _WIKITEXT[name]
    revision = hub_revision(hub, _offline_remedy(f"{name}/train.txt and {name}/valid.txt"))

    def read(split: str) -> Iterator[Document]:
        rows = hub_rows(hub._replace(split=split), revision)
        # the Hub's rows are the lines of the original files, where blank ones are empty
        return articles((row["text"] or " \n" for _, row in rows), f"{hub.name}:{split}")

    used = f"{name} (Hub {hub.name}@{revision})"
    val = Source(used, partial(read, "validation"))
    return Source(used, partial(read, "train"), validation=val)


def articles(lines: Iterable[str], place: str) -> Iterator[Document]:
    """Split the lines of a WikiText file into articles; concatenated, they are the whole file."""
    report, number = ReadReport(), 0
    article: list[str] = []
    blank = True  # a title is between blank lines; a line of mathematics may look like one
    for line in lines:
        if blank and _TITLE.fullmatch(line) and any(one.strip() for one in article):
            number += 1
            yield from document(f"{place}, article {number}", "".join(article), report)
            article = []
        article.append(line)
        blank = not line.strip()
    if any(one.strip() for one in article):
        yield from document(f"{place}, article {number + 1}", "".join(article), report)

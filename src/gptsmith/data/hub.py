"""Data sets of the Hugging Face Hub, streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gptsmith.data.documents import Document, Source, row_documents
from gptsmith.data.options import ReadOptions
from gptsmith.data.paths import UnavailableError
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row


class HubName(NamedTuple):
    """OWNER/NAME[:CONFIG[:SPLIT]] on the Hub."""

    name: str
    config: str | None = None
    split: str = "train"


def open_hub(hub: HubName, options: ReadOptions, report: ReadReport, remedy: str) -> Source:
    """A data set as a source of documents. Its revision is recorded and used in every pass.

    UnavailableError with the remedy if the Hub cannot be reached.
    """
    revision = hub_revision(hub, remedy)

    def read() -> Iterator[Document]:
        return row_documents(hub_rows(hub, revision), options, report)

    name = ":".join(filter(None, hub))
    return Source(f"Hub {name}@{revision}", read)


def hub_revision(hub: HubName, remedy: str) -> str:
    """The current commit of a data set. UnavailableError with the remedy if it cannot be read."""
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
    except ImportError:
        raise UnavailableError(
            f"{hub.name}: the Hub needs `pip install 'gptsmith[hub]'`; {remedy}"
        ) from None
    try:
        # datasets itself would try for half a minute before it reports that there is no network
        return str(HfApi().dataset_info(hub.name, timeout=10).sha)
    except Exception as error:  # of requests, httpx or httpx2, depending on the version
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"{hub.name}: not available from the Hub ({why}); {remedy}"
        ) from None


def hub_rows(hub: HubName, revision: str | None) -> Iterator[Row]:
    """The rows of one split. ValueError without a configuration or split of that name,
    ConnectionError if the stream breaks."""
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            hub.name, hub.config, split=hub.split, revision=revision, streaming=True
        )
    except ValueError as error:  # it lists the names, and how to call load_dataset
        why = " ".join(str(error).partition("\nExample of usage")[0].split())
        raise ValueError(f"{hub.name}: {why}; write {hub.name}:CONFIG:SPLIT") from None
    try:
        for number, row in enumerate(rows, 1):
            yield Row(f"{hub.name}, row {number}", row)
    except Exception as error:
        raise ConnectionError(
            f"{hub.name}: the connection to the Hub broke ({error!r}); run the same command again "
            "to resume"
        ) from None

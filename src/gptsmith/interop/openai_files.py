"""Download the files of OpenAI's GPT-2 from OpenAI's server."""

from pathlib import Path

from gptsmith import download
from gptsmith.download import RemoteFile

_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/models"
_DATA = "model.ckpt.data-00000-of-00001"
_NAMES = ("checkpoint", "encoder.json", "vocab.bpe", "hparams.json", "model.ckpt.index", _DATA)
# Size and sha256 where they are known; keys without a folder hold for every size. The checksums in
# the index detect damaged weights in any case.
_KNOWN: dict[str, tuple[int, str | None]] = {
    "checkpoint": (77, "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb"),
    "encoder.json": (
        1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "124M/hparams.json": (90, "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318"),
    "124M/model.ckpt.index": (
        5215, "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    ),
    f"124M/{_DATA}": (
        497_759_232, "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    ),
    "355M/hparams.json": (91, None),
    "355M/model.ckpt.index": (10_399, None),
    f"355M/{_DATA}": (1_419_292_672, None),
}  # fmt: skip
GPT2 = {
    size: [
        RemoteFile(name, *_KNOWN.get(name, _KNOWN.get(f"{size}/{name}", (None, None))))
        for name in _NAMES
    ]
    for size in ("124M", "355M", "774M", "1558M")
}


def gpt2(size: str) -> Path:
    """The folder of OpenAI's GPT-2 of this size (a key of GPT2), complete and verified.

    Raises FileNotFoundError, saying which files to put where, if they cannot be downloaded, and
    ValueError for a file that is not the published one.
    """
    with download.cache("gpt2", size) as folder:
        for remote in GPT2[size]:
            url = f"{_OPENAI}/{size}/{remote.name}"
            try:
                download.fetch(url, folder / remote.name, remote)
            except ConnectionError as error:
                missing = [w.name for w in GPT2[size] if not (folder / w.name).is_file()]
                raise FileNotFoundError(
                    f"GPT-2 {size} cannot be downloaded ({error}): put {', '.join(missing)} of "
                    f"{_OPENAI}/{size} into {folder} and run this again"
                ) from None
    return folder

"""Models of the Hugging Face Hub, fetched into its library's own cache, and verified."""

import re
from pathlib import Path

from gptsmith.download import Wanted, verify

# config.json comes last: a snapshot in the library's cache that has it is complete.
_TEXTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
_INDEX = "model.safetensors.index.json"


def fetch(name: str) -> tuple[Path, str, list[str]]:
    """The model OWNER/NAME of the Hugging Face Hub: its folder in the library's cache, its commit,
    and what the user should hear. Only configuration, tokenizer and safetensors are fetched.

    Raises FileNotFoundError, saying what to put where, if it cannot be had, and ValueError for a
    file that is not what the Hub says it is, or a model without safetensors.
    """
    remedy = (
        "put its config.json, tokenizer.json (with tokenizer_config.json and chat_template.jinja "
        "if it has them) and *.safetensors into a folder and import that"
    )
    try:
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    except ImportError:
        raise ValueError(
            f"{name}: the Hub needs pip install 'gptsmith[hub]'; or {remedy}"
        ) from None
    try:
        # asked first: hf_hub_download would try for half a minute before it says it has no network
        info = HfApi().model_info(name, files_metadata=True, timeout=10)
    except Exception as error:  # of requests, httpx or httpx2: each version has its own
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            folder = Path(cached).parent
            note = f"the Hub is out of reach: {name} is taken as it was when it was fetched"
            return folder, folder.name, [note]
        raise FileNotFoundError(
            f"{name} is no folder here, nor to be had from the Hub ({_first_line(error)}): {remedy}"
        ) from None
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for file in _needed(name, list(there)):
        # Under its branch, not its commit, the last file makes the library note where the branch
        # stood: without network the snapshot is found by that.
        revision = None if file == "config.json" else info.sha
        try:
            path = Path(hf_hub_download(name, file, revision=revision))
        except Exception as error:
            raise FileNotFoundError(
                f"{name}: {file} cannot be fetched ({_first_line(error)}): run this again, it goes "
                f"on; or {remedy}"
            ) from None
        lfs = there[file].lfs
        wanted = Wanted(file, there[file].size, lfs.sha256 if lfs else None)
        try:
            verify(path, wanted, "deleted, run this again")
        except ValueError:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise
    if path.parent.name != info.sha:
        raise ValueError(f"{name} has changed on the Hub while it was fetched: run this again")
    return path.parent, path.parent.name, []


def _needed(name: str, there: list[str]) -> list[str]:
    """Which of the files of a model on the Hub to fetch; never code, never a pickle."""
    if "config.json" not in there:
        raise ValueError(f"{name} on the Hub has no config.json: it is no model of transformers")
    weights = ["model.safetensors"]
    if weights[0] not in there:
        weights = sorted(f for f in there if re.fullmatch(r"model-\d+-of-\d+\.safetensors", f))
        if not weights or _INDEX not in there:
            raise ValueError(
                f"{name} on the Hub has no model.safetensors, and pickled weights are not opened: "
                "convert it with transformers' save_pretrained and import the folder"
            )
        weights.append(_INDEX)
    return weights + [file for file in _TEXTS if file in there]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Models of the Hugging Face Hub, downloaded by huggingface_hub into its cache."""

from pathlib import Path

# No code and no pickles.
_PATTERNS = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
]  # fmt: skip
_REMEDY = (
    "put its config.json, tokenizer.json (with tokenizer_config.json and chat_template.jinja if it "
    "has them) and *.safetensors into a folder and import that"
)


def fetch(name: str) -> tuple[Path, str, list[str]]:
    """Download the model OWNER/NAME; returns its folder in the cache, its commit and notes.

    Only configuration, tokenizer and safetensors are downloaded. Raises FileNotFoundError, saying
    which files to put where, if the model is not available, and ValueError for a model without
    safetensors.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise ValueError(
            f"{name}: the Hub needs pip install 'gptsmith[hub]'; or {_REMEDY}"
        ) from None
    try:
        # Checked first, because without a network the download would retry for half a minute.
        info = HfApi().model_info(name, timeout=10)
    except Exception as error:  # of requests, httpx or the library: versions differ
        try:
            folder = Path(snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=True))
        except Exception:
            raise FileNotFoundError(
                f"{name} is not a local folder, nor available from the Hub ({_first_line(error)}): "
                f"{_REMEDY}"
            ) from None
        return folder, folder.name, [f"the Hub is unreachable: using the cached {name}"]
    _check(name, [sibling.rfilename for sibling in info.siblings or ()])
    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} cannot be downloaded ({_first_line(error)}): run this again to resume, or "
            f"{_REMEDY}"
        ) from None
    return folder, folder.name, []


def _check(name: str, available: list[str]) -> None:
    """ValueError, before the download, unless there is a model in safetensors."""
    if "config.json" not in available:
        raise ValueError(f"{name} on the Hub has no config.json: it is not a model of transformers")
    if not {"model.safetensors", "model.safetensors.index.json"} & set(available):
        raise ValueError(
            f"{name} on the Hub has no model.safetensors, and pickled weights are not opened: "
            "convert it with transformers' save_pretrained and import the folder"
        )


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])

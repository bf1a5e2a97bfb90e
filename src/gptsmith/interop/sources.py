"""What can be imported, by path or name, and which reader opens it."""

import re
from dataclasses import replace
from pathlib import Path

from gptsmith.interop import hf, hub, nanogpt, openai_files, openai_tf
from gptsmith.interop.external_model import ExternalModel

_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Names without an owner, which the Hub no longer uses.
_OWNERS = {"distilgpt2": "distilbert/distilgpt2"} | {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
_NANOGPT = (".pt", ".pth", ".ckpt")
_OTHERS = {
    ".gguf": "is an export for llama.cpp: import the model that it was made from",
    ".bin": "is a pickle of weights, which can run code: if you trust it, load it with "
    "transformers, save it with save_pretrained and import that folder",
    ".safetensors": "has weights only: put its config.json into the same folder",
    ".index": "is TensorFlow's: put hparams.json (n_vocab, n_ctx, n_embd, n_head, n_layer), "
    "encoder.json and vocab.bpe into the same folder",
}
_EXPECTED = "a folder with config.json or hparams.json, or a .pt file of nanoGPT"


def open_source(source: str) -> ExternalModel:
    """The model at a path, or by name: a size of OpenAI's GPT-2, or OWNER/NAME of the Hub.

    An existing path comes before a name, and the files in it decide. Raises ValueError or
    FileNotFoundError that says what was found or expected, and the remedy.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        return _open_file(path)
    if source in openai_files.GPT2:
        found = openai_tf.open_folder(openai_files.gpt2(source))
        return replace(found, origin={**found.origin, "import": source})
    if _ON_HUB.fullmatch(source):
        folder, revision, notes = hub.fetch(source)
        found = hf.open_folder(folder)
        origin = {**found.origin, "import": source, "revision": revision}
        return replace(found, origin=origin, notes=[*notes, *found.notes])
    known = f" ({_OWNERS[source]} on the Hub)" if source in _OWNERS else ""
    raise FileNotFoundError(
        f"{source}: there is no such file or folder{known}; expected {_EXPECTED}, a size of GPT-2 "
        f"({', '.join(openai_files.GPT2)}), or OWNER/NAME of the Hub"
    )


def _open_folder(folder: Path) -> ExternalModel:
    names = sorted(child.name for child in folder.iterdir() if child.is_file())
    if {"config.yaml", "model.json"} <= set(names):
        raise ValueError(f"{folder} is a run of gptsmith already: use it as it is")
    if "hparams.json" in names:
        return openai_tf.open_folder(folder)
    if "config.json" in names:
        return hf.open_folder(folder)
    if "manifest.json" in names:
        raise ValueError(
            f"{folder} is a prepared corpus or a run's checkpoint: import takes models"
        )
    if "adapter_config.json" in names:
        raise ValueError(
            f"{folder} is an adapter, not a model: merge it into its base with peft's "
            "merge_and_unload, save that with save_pretrained and import the folder"
        )
    for name in names:
        if Path(name).suffix in _NANOGPT:
            raise ValueError(
                f"{folder} has no config.json: for a nanoGPT checkpoint, give {folder / name}"
            )
        if Path(name).suffix in _OTHERS:
            raise ValueError(f"{folder}: {name} {_OTHERS[Path(name).suffix]}")
    raise ValueError(f"{folder} holds no model: expected {_EXPECTED}")


def _open_file(path: Path) -> ExternalModel:
    if path.suffix in _NANOGPT and path.is_file():  # not a pipe, which never ends
        return nanogpt.open_file(path)
    folder = path.parent
    if (folder / "config.json").is_file() or (folder / "hparams.json").is_file():
        raise ValueError(f"{path} is one file of a model: give its folder, {folder}")
    if path.suffix in _OTHERS:
        raise ValueError(f"{path} {_OTHERS[path.suffix]}")
    raise ValueError(f"{path} is not a model: expected {_EXPECTED}")

"""Open a model to import, given by path or name, with the reader for its format."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gptsmith import files
from gptsmith.interop import hf, hf_tokenizer, hub, nanogpt, openai_files, openai_tf, peft
from gptsmith.interop.external_model import ExternalModel, check_vocabulary
from gptsmith.model import lora, state_dict
from gptsmith.recognize import is_artifact, is_gguf, wrong_kind
from gptsmith.tokenizer import Tokenizer, TokenRoles

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Names without an owner, which the Hub no longer uses.
_HUB_OWNERS = {"distilgpt2": "distilbert/distilgpt2"} | {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
_NANOGPT = (".pt", ".pth", ".ckpt")
_UNSUPPORTED = {
    ".gguf": "is an export for llama.cpp: import the model that it was made from",
    ".bin": "is a pickle of weights, which can run code: if you trust it, load it with "
    "transformers, save it with save_pretrained and import that folder",
    ".safetensors": "has weights only: put its config.json into the same folder",
    ".index": "is TensorFlow's: put hparams.json (n_vocab, n_ctx, n_embd, n_head, n_layer), "
    "encoder.json and vocab.bpe into the same folder",
}
_EXPECTED = (
    "a folder with config.json, hparams.json or adapter_config.json, or a .pt file of nanoGPT"
)


def open_source(source: str, eos_tokens: Sequence[str] = ()) -> ExternalModel:
    """The model at a path, or by name: a size of OpenAI's GPT-2, or OWNER/NAME of the Hub.

    eos_tokens: names of the tokens that end a text, overriding the model's files.

    An existing path takes precedence over a name; its files decide the format. Raises ValueError or
    FileNotFoundError that says what was found or expected, and the remedy.
    """
    model = _open(source, eos_tokens)
    return replace(model, tokenizer=model.tokenizer.with_eos(eos_tokens)) if eos_tokens else model


def _open(source: str, eos_tokens: Sequence[str]) -> ExternalModel:
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, eos_tokens)
    if path.exists():
        return _open_file(path)
    if source in openai_files.GPT2:
        found = openai_tf.open_folder(openai_files.gpt2(source))
        return replace(found, origin={**found.origin, "import": source})
    if _HUB_NAME.fullmatch(source):
        folder, revision, notes = hub.fetch(source)
        found = hf.open_folder(folder, eos_tokens)
        origin = {**found.origin, "import": source, "revision": revision}
        return replace(found, origin=origin, notes=[*notes, *found.notes])
    known = f" ({_HUB_OWNERS[source]} on the Hub)" if source in _HUB_OWNERS else ""
    raise FileNotFoundError(
        f"{source}: there is no such file or folder{known}; expected {_EXPECTED}, a size of GPT-2 "
        f"({', '.join(openai_files.GPT2)}), or OWNER/NAME of the Hub"
    )


def _open_folder(folder: Path, eos_tokens: Sequence[str]) -> ExternalModel:
    names = sorted(child.name for child in folder.iterdir() if child.is_file())
    if "hparams.json" in names:
        return openai_tf.open_folder(folder)
    if "config.json" in names:
        return hf.open_folder(folder, eos_tokens)
    if peft.CONFIG in names:
        return _open_adapter(folder)
    if is_artifact(folder):
        raise wrong_kind(folder, "a model to import")
    for name in names:
        if Path(name).suffix in _NANOGPT:
            raise ValueError(
                f"{folder} has no config.json: for a nanoGPT checkpoint, give {folder / name}"
            )
        if (suffix := Path(name).suffix.lower()) in _UNSUPPORTED:
            raise ValueError(f"{folder}: {name} {_UNSUPPORTED[suffix]}")
    raise ValueError(f"{folder} holds no model: expected {_EXPECTED}")


def _open_adapter(folder: Path) -> ExternalModel:
    """A LoRA adapter in peft's format, merged into its base model.

    The base is the folder that adapter_config.json names or, if that does not exist, `base` inside
    the adapter's folder, where `export --adapter` writes it. A tokenizer in the adapter's folder
    replaces the base's.
    """
    path = folder / peft.CONFIG
    name = str(files.read_mapping(path).get("base_model_name_or_path") or "")
    if not Path(name).is_dir() and (folder / "base").is_dir():  # the folder was moved
        name = str(folder / "base")
    if not name or (Path(name) / peft.CONFIG).is_file():
        what = f"names {name}, an adapter too," if name else "names no model"
        raise ValueError(
            f"{path} {what} as its base: put the folder of the base at {folder / 'base'}"
        )
    try:
        base = open_source(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is an adapter, its base is not here: {error}") from None
    adapter = peft.load(folder, base.config)
    if (folder / "tokenizer.json").is_file():
        tokenizer = hf_tokenizer.read(folder, "")
        if (declared := base.tokenizer.declared_roles) is not None:  # ids are in the base's config
            own = tokenizer.declared_roles or declared
            roles = TokenRoles(own.tokenizer, declared.config, declared.generation)
            tokenizer = Tokenizer(tokenizer.to_json(), folder / "tokenizer.json", roles)
        check_vocabulary(folder, tokenizer, base.config)
        template, template_notes = hf_tokenizer.read_template(folder, tokenizer)
        notes = [*base.notes, *template_notes]
        base = replace(base, tokenizer=tokenizer, template=template or base.template, notes=notes)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        model = state_dict.load(base.config, dict(base.tensors()), name).float()
        peft.attach_adapter(model, adapter, folder)
        lora.merge(model)
        yield from ((n, tensor.to(base.dtype)) for n, tensor in model.state_dict().items())

    note = f"the adapter (rank {adapter.lora.rank}) is merged into {name}"
    return replace(
        base, tensors=tensors, notes=[*base.notes, note],
        origin={**base.origin, "import": str(folder), "adapter_of": name},
    )  # fmt: skip


def _open_file(path: Path) -> ExternalModel:
    if path.suffix in _NANOGPT and path.is_file():  # not a pipe, which never ends
        return nanogpt.open_file(path)
    folder = path.parent
    if (folder / "config.json").is_file() or (folder / "hparams.json").is_file():
        raise ValueError(f"{path} is one file of a model: give its folder, {folder}")
    suffix = ".gguf" if is_gguf(path) else path.suffix.lower()
    if suffix in _UNSUPPORTED:
        raise ValueError(f"{path} {_UNSUPPORTED[suffix]}")
    raise ValueError(f"{path} is not a model: expected {_EXPECTED}")

"""Import GPT-2 in OpenAI's original format: a TensorFlow checkpoint, hparams.json and BPE tables.

The folder contains hparams.json, checkpoint (which names the newest), NAME.index,
NAME.data-0000i-of-0000n, encoder.json and vocab.bpe. gpt-2-simple and nshepperd's fine-tuning
write the same format, plus the optimizer's variables, which are ignored. Names and shapes:
src/model.py of github.com/openai/gpt-2.
"""

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from gptsmith import files
from gptsmith.interop import tf_bundle
from gptsmith.interop.external_model import ExternalModel, check_vocabulary, config_from
from gptsmith.interop.hf_mapping import gpt2_names
from gptsmith.interop.tf_bundle import Variable
from gptsmith.tokenizer import Tokenizer

_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_ctx": "context_length",
    "n_vocab": "vocab_size",
}


def open_folder(folder: Path) -> ExternalModel:
    """The GPT-2 in `folder`; its tensors are read and their checksums verified one at a time.

    Raises ValueError or FileNotFoundError, naming the file that is missing, damaged or of another
    architecture.
    """
    prefix, hparams = _newest(folder), folder / "hparams.json"
    variables = _weights(tf_bundle.read_index(prefix))
    config = config_from(files.read_mapping(hparams), _SIZES, hparams)
    given = {  # a matrix is (1, in, out), the kernel of a convolution of width 1
        name: variable.shape[:0:-1] if variable.shape[:-2] == (1,) else variable.shape
        for name, variable in variables.items()
    }
    names = gpt2_names(config, given, prefix, _variable)
    dtypes = []
    for name, variable in variables.items():
        if variable.dtype is None:
            raise ValueError(f"{prefix}: {name} does not consist of floating-point numbers")
        dtypes.append(variable.dtype)
    dtype = reduce(torch.promote_types, dtypes)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(folder, tokenizer, config)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for ours, name in names.items():
            tensor = tf_bundle.read_tensor(variables[name]).to(dtype)
            yield ours, tensor.squeeze(0).T.contiguous() if tensor.dim() == 3 else tensor

    return ExternalModel(
        config=config,
        tensors=tensors,
        dtype=dtype,
        tokenizer=tokenizer,
        template=None,
        origin={"import": str(folder), "format": "openai-tensorflow", "checkpoint": prefix.name},
        notes=[],
    )


def _weights(variables: Mapping[str, Variable]) -> dict[str, Variable]:
    """The model's variables. The optimizer's are named below them (model/wte/Adam) or outside
    model/ (beta1_power, global_step)."""

    def is_below_another(name: str) -> bool:
        return any(name.rsplit("/", n)[0] in variables for n in range(1, name.count("/")))

    return {
        name: variable
        for name, variable in variables.items()
        if name.startswith("model/") and not is_below_another(name)
    }


def _variable(name: str) -> str:
    """transformers' name of a tensor of GPT-2 -> TensorFlow's: transformer.h.0.ln_1.weight is
    model/h0/ln_1/g."""
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    path = re.sub(r"^h\.", "h", module).replace(".", "/")
    if module in ("wte", "wpe"):
        return f"model/{path}"
    weight = "g" if path.rpartition("/")[2].startswith("ln_") else "w"
    return f"model/{path}/{weight if kind == 'weight' else 'b'}"


def _newest(folder: Path) -> Path:
    """FOLDER/NAME of the checkpoint that the file `checkpoint` names, or of the only one."""
    named = folder / "checkpoint"
    if named.is_file():
        text = named.read_text(encoding="utf-8", errors="replace")[:10_000]
        if found := re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE):
            # possibly an absolute path on the machine that trained it
            name = found[1].replace("\\", "/").rpartition("/")[2]
            if not (folder / f"{name}.index").is_file():
                raise FileNotFoundError(f"{folder / name}.index: missing, {named} names it")
            return folder / name
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise ValueError(
            f"{folder} has {len(indices) or 'no'} checkpoints (NAME.index): expected one, or "
            f'{named.name} with a line model_checkpoint_path: "NAME"'
        )
    return indices[0].with_suffix("")

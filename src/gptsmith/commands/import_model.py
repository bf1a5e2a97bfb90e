"""`gptsmith import SOURCE --out RUN`: convert an external model to a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gptsmith import files, terminal
from gptsmith.config import Section, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from gptsmith.interop.external_model import ExternalModel
    from gptsmith.run import Run


class ImportOptions(Section):
    """Import a model from elsewhere as a run."""

    source: str
    """A model folder of transformers or OpenAI's GPT-2, a nanoGPT .pt file, a size of GPT-2 (124M,
    355M, 774M, 1558M), or OWNER/NAME on the Hugging Face Hub."""
    out: Path
    """The run to create: a new or empty folder."""
    eos_token: tuple[str, ...] = ()
    """Token that ends a text, repeatable; the first becomes the tokenizer's eos token (default: as
    the model's own files declare)."""


def main(argv: list[str]) -> None:
    options = load_config(ImportOptions, argv, prog="gptsmith import", positional="source")
    files.check_creatable(options.out)  # before a download, not after

    from gptsmith.interop.sources import open_source
    from gptsmith.model.flops import parameters
    from gptsmith.run.create import create_from_weights

    model = open_source(options.source, options.eos_token)
    _describe(model, parameters(model.config))
    total = parameters(model.config) * model.dtype.itemsize
    run = create_from_weights(
        options.out,
        dict(model.origin),
        model.config,
        model.tokenizer,
        _with_progress(model.tensors(), total),
        model.dtype,
        model.template,
    )
    for note in model.notes:
        terminal.note(f"note: {note}")
    terminal.say(f"wrote the run {run.path}; next: {_next_command(run)}")


def _describe(model: ExternalModel, parameters: int) -> None:
    config, tokenizer = model.config, model.tokenizer
    name = model.origin.get("class", model.origin["format"])
    dtype = str(model.dtype).removeprefix("torch.")
    padding = config.vocab_size - tokenizer.vocab_size
    unused = f", {padding:,} rows of the model unused" if padding else ""
    terminal.say(f"  model      {name}, {parameters:,} parameters in {dtype}")
    terminal.say(f"  context    {config.context_length:,} tokens")
    terminal.say(f"  tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{unused}")
    if config.labels:
        terminal.say(f"  classes    {', '.join(config.labels)}")
    else:
        terminal.say(f"  template   {'for chat, included' if model.template else 'none'}")


def _next_command(run: Run) -> str:
    path = shlex.quote(str(run.path))
    if run.model_config.labels:
        return f"gptsmith classify {path} TEXT"
    if run.template is not None:
        return f"gptsmith chat {path}"
    return f'gptsmith generate {path} --prompt "..."'


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], total: int
) -> Iterator[tuple[str, Tensor]]:
    """The tensors; `total` bytes of them are reported as they are used."""
    from gptsmith.progress import WorkProgress

    done = 0
    with WorkProgress("importing", total, percent=True) as shown:
        for name, tensor in tensors:
            done += tensor.nbytes
            yield name, tensor
            shown.update(done, name)

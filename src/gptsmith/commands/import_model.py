"""`gptsmith import SOURCE --out RUN`: a model from elsewhere becomes a run."""

import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gptsmith import files
from gptsmith.config import Section, load_config
from gptsmith.interop.external_model import ExternalModel
from gptsmith.interop.sources import open_source
from gptsmith.model.flops import parameters
from gptsmith.run import Run

_PLAIN_SECONDS = 5.0


class ImportOptions(Section):
    """What to import, and where to."""

    source: str
    """A folder of transformers or of OpenAI's GPT-2, a nanoGPT .pt file, a size of GPT-2 (124M,
    355M, 774M, 1558M), or OWNER/NAME of the Hugging Face Hub."""
    out: Path
    """The run to make: a new or empty folder."""


def main(argv: list[str]) -> None:
    options = load_config(
        ImportOptions,
        argv,
        prog="gptsmith import",
        description="Make a run of a model from elsewhere.",
        positional="source",
    )
    files.refuse_occupied(options.out)  # before a download, not after
    imported = open_source(options.source)
    _describe(imported)
    total = parameters(imported.config) * imported.dtype.itemsize
    run = Run.from_weights(
        options.out,
        dict(imported.origin),
        imported.config,
        imported.tokenizer,
        _shown(imported.tensors(), total),
        imported.dtype,
        imported.template,
    )
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{run.path} is a run now: {_next(run)}")


def _describe(imported: ExternalModel) -> None:
    config, tokenizer = imported.config, imported.tokenizer
    name = imported.origin.get("class", imported.origin["format"])
    dtype = str(imported.dtype).removeprefix("torch.")
    padding = config.vocab_size - tokenizer.vocab_size
    unused = f", {padding:,} rows of the model unused" if padding else ""
    print(f"  model      {name}, {parameters(config):,} parameters in {dtype}")
    print(f"  context    {config.context_length:,} tokens")
    print(f"  tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{unused}")
    if config.labels:
        print(f"  classes    {', '.join(config.labels)}")
    else:
        print(f"  template   {'for chat, included' if imported.template else 'none'}")


def _next(run: Run) -> str:
    path = shlex.quote(str(run.path))
    if run.model_config.labels:
        return f"gptsmith classify {path} TEXT"
    if run.template is not None:
        return f"gptsmith chat {path}"
    return f'gptsmith generate {path} --prompt "..."'


def _shown(tensors: Iterable[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they come, with a bar on a terminal, elsewhere a line now and then."""
    console = Console(stderr=True, highlight=False)
    done, last = 0, time.monotonic()
    columns = (TextColumn("importing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for name, tensor in tensors:
            done += tensor.nbytes
            yield name, tensor
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                console.print(f"importing: {done / total:.0%}, {name}")

"""`gptsmith export RUN --format hf|gguf --out DIR`: a run in a form that other programs open."""

import shlex
import sys
from pathlib import Path
from typing import Literal

import torch

from gptsmith.config import Section, load_config
from gptsmith.run import Run, Which

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KINDS: dict[str, Literal["f32", "f16", "bf16", "q8_0"]] = {
    "fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0",
}  # fmt: skip


class ExportOptions(Section):
    """What to export, and as what."""

    run: Path
    """A run folder."""
    out: Path
    """The folder to make: a new or empty one."""
    format: Literal["hf", "gguf"]
    """hf: for transformers, vLLM and what else reads its folders; gguf: for llama.cpp, Ollama."""
    dtype: Literal["keep", "fp32", "bf16", "fp16", "q8_0"] | None = None
    """Number format of the weights. hf: keep (that of the run), fp32, bf16 or fp16; without this
    option, keep. gguf: fp32, bf16, fp16 or q8_0 (8 bits); without this option, fp16."""
    checkpoint: Which = "last"
    """Which weights: of the last step, of the best validation loss, or of a step that was kept."""
    adapter: bool = False
    """hf: a LoRA run as peft's adapter, its base model beside it, instead of the two merged."""


def main(argv: list[str]) -> None:
    options = load_config(
        ExportOptions,
        argv,
        prog="gptsmith export",
        description="Write a run in a form that other programs open.",
        positional="run",
    )
    allowed = ("keep", *_DTYPES) if options.format == "hf" else tuple(_KINDS)
    if options.dtype not in (None, *allowed):
        raise ValueError(
            f"--dtype {options.dtype}: --format {options.format} takes {', '.join(allowed)}"
        )
    if options.adapter and options.format == "gguf":
        raise ValueError("--adapter: a gguf holds the merged model; leave it away")
    run = Run.open(options.run)
    if options.format == "hf":
        from gptsmith.interop import hf_export

        notes = hf_export.export(
            run,
            options.out,
            dtype=_DTYPES.get(options.dtype or ""),
            checkpoint=options.checkpoint,
            adapter=options.adapter,
        )
    else:
        from gptsmith.interop import gguf

        kind = _KINDS[options.dtype or "fp16"]
        notes = gguf.export(run, options.out, kind=kind, checkpoint=options.checkpoint)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{options.out}: {_size(options.out)}; {_opens(options, run)}")


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:,.1f} MB"


def _opens(options: ExportOptions, run: Run) -> str:
    if options.format == "gguf":
        modelfile = shlex.quote(str(options.out / "Modelfile"))
        return f"ollama create NAME -f {modelfile}, or llama.cpp with the .gguf"
    kind = "SequenceClassification" if run.model_config.labels else "CausalLM"
    cls = f"peft.AutoPeftModelFor{kind}" if options.adapter else f"AutoModelFor{kind}"
    return f"{cls}.from_pretrained({str(options.out)!r})"

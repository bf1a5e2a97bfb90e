"""`gptsmith export RUN --format hf|gguf --out DIR`: convert a run for other programs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptsmith import terminal
from gptsmith.config import Section, load_config
from gptsmith.run import CheckpointName

if TYPE_CHECKING:
    from gptsmith.interop.external_model import ExportableModel
    from gptsmith.run import Run

# --dtype -> the name of the number format in torch, and in GGUF.
_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_GGUF_KINDS: dict[str, Literal["f32", "f16", "bf16", "q8_0", "q4_0"]] = {
    "fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0", "q4_0": "q4_0",
}  # fmt: skip


class ExportOptions(Section):
    """Convert a run into a format that other programs open."""

    run: Path
    """A run folder."""
    out: Path
    """The folder to create: a new or empty one."""
    format: Literal["hf", "gguf"]
    """hf: a folder for transformers, vLLM and others; gguf: a file for llama.cpp and Ollama."""
    dtype: Literal["keep", "fp32", "bf16", "fp16", "q8_0", "q4_0"] | None = None
    """Number format of the weights. hf: keep (as in the run, the default), fp32, bf16 or fp16.
    gguf: fp32, bf16, fp16 (the default), q8_0 (8 bits) or q4_0 (4 bits)."""
    checkpoint: CheckpointName = "last"
    """Which weights: of the last step, of the best validation loss, or of a kept step."""
    adapter: bool = False
    """hf: export a LoRA run as peft's adapter with its base model, instead of the merged model."""


def main(argv: list[str]) -> None:
    options = load_config(ExportOptions, argv, prog="gptsmith export", positional="run")
    allowed = ("keep", *_TORCH_DTYPES) if options.format == "hf" else tuple(_GGUF_KINDS)
    if options.dtype not in (None, *allowed):
        raise ValueError(
            f"--dtype {options.dtype}: --format {options.format} takes {', '.join(allowed)}"
        )
    if options.adapter and options.format == "gguf":
        raise ValueError("--adapter: a gguf holds the merged model; omit --adapter")

    from gptsmith.run import Run

    run = Run.open(options.run)
    for note in export(run, options):
        terminal.note(f"note: {note}")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    terminal.say(f"{options.out}: {size / 1e6:,.1f} MB; {_how_to_open(options, run)}")


def export(run: Run, options: ExportOptions) -> list[str]:
    """Write `options.out`; returns notes for the user."""
    if options.format == "gguf":
        from gptsmith.interop import gguf

        kind = _GGUF_KINDS[options.dtype or "fp16"]
        notes = gguf.export(exportable(run, options.checkpoint), options.out, kind)
    else:
        import torch

        from gptsmith.interop import hf

        name = _TORCH_DTYPES.get(options.dtype or "keep")
        dtype = getattr(torch, name) if name else None
        if options.adapter:
            if not run.tuning.lora.rank:
                raise ValueError(f"{run.path} has no adapter, it was not trained with LoRA")
            base, adapter = exportable(run, base=True), run.load_adapter(options.checkpoint)
            notes = hf.export_adapter(base, adapter, options.out, dtype)
        else:
            notes = hf.export(exportable(run, options.checkpoint), options.out, dtype)
    return [*([run.notice] if run.notice else []), *notes]


def exportable(
    run: Run, checkpoint: CheckpointName = "last", base: bool = False
) -> ExportableModel:
    """A run in the form that exporters take. base: the base model of a LoRA run."""
    from gptsmith.interop.external_model import ExportableModel

    source = str(run.config.get("import", ""))
    return ExportableModel(
        name=run.path.resolve().name,
        config=run.model_config,
        tensors=lambda: (run.base_model() if base else run.load_model(checkpoint)).state_dict(),
        tokenizer=run.tokenizer,
        chat_template=run.chat_template,
        # of a local path, only the name
        imported_from=source if "revision" in run.config else Path(source).name,
    )


def _how_to_open(options: ExportOptions, run: Run) -> str:
    if options.format == "gguf":
        modelfile = shlex.quote(str(options.out / "Modelfile"))
        return f"ollama create NAME -f {modelfile}, or llama.cpp with the .gguf"
    kind = "SequenceClassification" if run.model_config.labels else "CausalLM"
    cls = f"peft.AutoPeftModelFor{kind}" if options.adapter else f"AutoModelFor{kind}"
    return f"{cls}.from_pretrained({str(options.out)!r})"

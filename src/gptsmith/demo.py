"""The whole life of a model on data that every Python installation carries, by the usual commands.

Each stage is the very command that a user would type; it is shown before it runs.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from gptsmith import settings
from gptsmith.commands import generate, prepare
from gptsmith.recipes import pretrain
from gptsmith.recipes.report import number
from gptsmith.run import Run
from gptsmith.train import checkpoint
from gptsmith.train.monitor import read_events

PROMPTS = ("The function returns", "def ", "Raises ValueError if")


class DemoConfig(BaseModel):
    """Train a small GPT on the documentation of your own Python and let it write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Path()
    """Where data/ and runs/ are made."""
    seconds: float = Field(180.0, gt=0)
    """Time for pretraining; on a resumed demo, in all."""


def main(argv: Sequence[str]) -> int:
    """`gptsmith demo [--folder DIR] [--seconds N]`: prepare, pretrain, generate, and a summary."""
    config = settings.load(
        DemoConfig,
        argv,
        prog="gptsmith demo",
        description="Train a small GPT on your own Python's documentation and let it write.",
    )
    console = Console()
    corpus, run = config.folder / "data" / "pydocs", config.folder / "runs" / "demo"
    console.rule("1  text -> tokens")
    code = _show("prepare", "pydocs", "--tokenizer", "bpe", "--vocab-size", "2048", "--out", corpus)
    if code:
        return code
    console.rule("2  tokens -> model")
    if not (run / "model.safetensors").is_file():
        going_on = ["--resume"] if checkpoint.steps(run / "checkpoints") else []
        code = _show(
            "pretrain", "--data", corpus, "--out", run,
            "--model.n-layer", "4", "--model.n-embd", "256", "--model.n-head", "4",
            "--model.context-length", "256", "--train.batch-size", "8",
            "--train.seconds", f"{config.seconds:g}",
            "--optim.schedule", "linear", "--optim.learning-rate", "0.01",
            "--optim.momentum", "0.9", "--optim.embedding-rate", "2",
            "--eval.every", "100", "--eval.tokens", "16384",
            "--eval.prompt", PROMPTS[0], *going_on,
        )  # fmt: skip
        if code:
            return code
    console.rule("3  model -> text")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    code = _show("generate", run, *prompts, "--max-new-tokens", "80", "--temperature", "0.7")
    if code:
        return code
    console.rule("what it learned")
    _summary(Run.open(run), console)
    print(f"""
{run}/report.md, curves.png, samples.txt tell how it went. Next:

  gptsmith generate {run} --prompt "Return a list of" --num-samples 3
  gptsmith evaluate {run}
  gptsmith inspect {corpus}
  gptsmith prepare YOUR_TEXT.txt --out data/mine
  gptsmith pretrain --data data/mine --out runs/mine
""")
    return 0


def _show(*words: str | Path) -> int:
    """Print a command as one would type it, and run what it runs."""
    verb, *argv = [str(word) for word in words]
    print(f"$ gptsmith {verb} {shlex.join(argv)}", flush=True)
    if verb == "pretrain":  # its clock starts now, not when the demo started
        return pretrain.main(argv, time.perf_counter())
    return {"prepare": prepare.main, "generate": generate.main}[verb](argv) or 0


def _summary(run: Run, console: Console) -> None:
    """The same measurements and the same prompt, before training and after it."""
    events = read_events(run.metrics)
    table = Table(show_header=True, show_lines=True)
    for name in ("", "before", "after"):
        table.add_column(name, overflow="fold", ratio=None if not name else 1)
    val = [e for e in events if e["event"] == "val"]
    for name, digits in (("val_loss", 3), ("perplexity", 1), ("bits_per_byte", 2), ("top1", 3)):
        table.add_row(
            name.replace("_", " "), *(number(e[name], f".{digits}f") for e in (val[0], val[-1]))
        )
    samples = [e for e in events if e["event"] == "sample"]
    table.add_row("sample", *(e["title"] + e["text"] for e in (samples[0], samples[-1])))
    console.print(table, markup=False)

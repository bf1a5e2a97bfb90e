"""The report on a run folder: architecture, cost, last metrics, checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from gptsmith.console import Console, Text
from gptsmith.inspect.render import file_size, heading, print_report, properties, title
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import (
    TrainingMemory,
    flops_per_token,
    kv_cache_bytes,
    parameters,
    training_memory,
)
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint, monitor


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on disk, its size in bytes, and a description of its damage (None: intact)."""

    step: int
    size: int
    damage: str | None


@dataclass(frozen=True)
class RunReport:
    """What `gptsmith inspect` shows of a run.

    memory: training with one row of context_length tokens in fp32. cache_bytes: keys and values of
    one such row. metrics: the last value of each. best: lowest val_loss and its step.
    weights_bytes: None while the run is unfinished. damage: of the record and the final weights.
    """

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    parameters: int
    flops_per_token: int
    memory: TrainingMemory
    cache_bytes: int
    metrics: dict[str, Any]
    best: tuple[float, int] | None
    checkpoints: list[StoredCheckpoint]
    weights_bytes: int | None
    damage: list[str]


def run_report(path: str | Path) -> RunReport:
    """The report on the run at `path`; every checkpoint is verified."""
    run = Run.open(path)
    c = run.model_config
    damage: list[str] = []
    try:
        rows = monitor.table(monitor.read_events(run.metrics))
    except ValueError as error:
        rows, damage = [], [str(error)]
    try:
        run.verify_weights()
    except ValueError as error:
        damage.append(str(error))
    scores = [(row["val_loss"], row["step"]) for row in rows if row["val_loss"] is not None]
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    stored = []
    for folder in sorted(run.checkpoints.glob("step-*")):
        step = folder.name.removeprefix("step-")
        if step.isdigit() and folder.is_dir():
            try:
                size = sum(file.stat().st_size for file in folder.iterdir())
                problem = checkpoint.verify(folder, int(step))
            except FileNotFoundError:
                continue
            if problem is None or folder.exists():  # else pruned by the process that trains here
                stored.append(StoredCheckpoint(int(step), size, problem))
    return RunReport(
        path=run.path,
        model=c,
        tokenizer=run.tokenizer,
        parameters=parameters(c),
        flops_per_token=flops_per_token(c),
        memory=training_memory(c, 1, c.context_length),
        cache_bytes=kv_cache_bytes(c, 1, c.context_length),
        metrics=last,
        best=min(scores, default=None),
        checkpoints=stored,
        weights_bytes=run.weights.stat().st_size if run.weights.is_file() else None,
        damage=damage,
    )


def show_run(report: RunReport, console: Console) -> None:
    """Print the report."""
    print_report(_parts(report), console)


def _parts(report: RunReport) -> Iterator[RenderableType]:
    c, memory = report.model, report.memory
    heads = f"{c.n_head} heads" + (f" ({c.K} key/value)" if c.n_head != c.K else "")
    variant = [
        c.norm,
        c.mlp,
        c.position,
        f"bias {c.bias}",
        "tied" if c.tie_embeddings else "untied",
        *(["QK-norm"] if c.qk_norm else []),
        f"mask {c.mask}",
    ]
    yield title("run", report.path)
    yield properties(
        {
            "architecture": f"{c.n_layer} layers, {c.n_embd} wide, {heads} of {c.D}, MLP {c.F}, "
            f"context {c.context_length:,}",
            "": ", ".join(variant),
            "tokenizer": f"{report.tokenizer.kind}, {report.tokenizer.vocab_size:,} ids "
            f"(the model has {c.vocab_size:,})",
            "parameters": f"{report.parameters:,}",
            "training cost": f"{report.flops_per_token / 1e6:,.1f} MFLOP per token at full context",
            "memory for inference": f"weights {file_size(memory.weights)} in fp32, "
            f"{file_size(memory.weights // 2)} in bf16; "
            f"KV cache {file_size(report.cache_bytes)} per sequence at full context",
            "memory for training": f"{file_size(memory.total - memory.activations)} (fp32 weights, "
            f"gradients, AdamW) + {file_size(memory.activations)} per row of the micro-batch",
            "weights": "none: the run is unfinished, resume it"
            if report.weights_bytes is None
            else f"model.safetensors, {file_size(report.weights_bytes)}",
        }
    )
    if report.metrics:
        yield heading("last metrics")
        shown = {name: _number(value) for name, value in report.metrics.items()}
        if report.best:
            shown["best val_loss"] = f"{report.best[0]:.4f} at step {report.best[1]:,}"
        yield properties(shown)
    if report.damage:
        yield heading("damage")
        yield Text("\n".join(report.damage), "red")
    yield heading("checkpoints")
    table = Table.grid(padding=(0, 2))
    for stored in report.checkpoints:
        state = Text(f"damaged: {stored.damage}", "red") if stored.damage else Text("intact")
        table.add_row(f"step {stored.step:,}", file_size(stored.size), state)
    yield table if report.checkpoints else Text("none")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

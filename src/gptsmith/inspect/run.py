"""The report on a run folder: architecture, cost, last metrics, checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.filesize import decimal as file_size
from rich.table import Table

from gptsmith.console import Console, Text
from gptsmith.inspect.render import heading, print_report, properties, title
from gptsmith.model.flops import flops_per_token, kv_cache_bytes, parameters, training_memory
from gptsmith.run import Run, layout
from gptsmith.terminal import counted
from gptsmith.train import checkpoint, monitor


def show_run(run: Run, console: Console) -> None:
    """Print the report; final weights and every checkpoint are verified."""
    print_report(_parts(run), console)


def _parts(run: Run) -> Iterator[RenderableType]:
    yield title("run", run.path)
    yield _model_properties(run)
    damage: list[str] = []
    rows: list[dict[str, Any]] = []
    try:
        rows = monitor.table(monitor.read_events(run.metrics))
    except ValueError as error:
        damage.append(str(error))
    try:
        run.verify_weights()
    except ValueError as error:
        damage.append(str(error))
    if rows:
        yield heading("last metrics")
        yield _last_metrics(rows)
    if damage:
        yield heading("damage")
        yield Text("\n".join(damage), "red")
    yield heading("checkpoints")
    yield _checkpoints(run)


def _model_properties(run: Run) -> RenderableType:
    """Architecture, tokenizer, and the memory that inference and training need."""
    c, tokenizer = run.model_config, run.tokenizer
    heads = counted(c.n_head, "head") + (f" ({c.K} key/value)" if c.n_head != c.K else "")
    variant = [
        c.norm,
        c.mlp,
        c.position,
        f"bias {c.bias}",
        "tied" if c.tie_embeddings else "untied",
        *(["QK-norm"] if c.qk_norm else []),
        f"mask {c.mask}",
    ]
    memory = training_memory(c, 1, c.context_length)  # one row of a full context, in fp32
    cache = kv_cache_bytes(c, 1, c.context_length)
    weights = "none: the run is unfinished, resume it"
    if run.weights.is_file():
        weights = f"{run.weights.name}, {file_size(run.weights.stat().st_size)}"
    return properties(
        {
            "architecture": f"{counted(c.n_layer, 'layer')}, {c.n_embd} wide, {heads} of {c.D}, "
            f"MLP {c.F}, context {c.context_length:,}",
            "": ", ".join(variant),
            "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids "
            f"(the model has {c.vocab_size:,})",
            "parameters": f"{parameters(c):,}",
            "training cost": f"{flops_per_token(c) / 1e6:,.1f} MFLOP per token at full context",
            "memory for inference": f"weights {file_size(memory.weights)} in fp32, "
            f"{file_size(memory.weights // 2)} in bf16; "
            f"KV cache {file_size(cache)} per sequence at full context",
            "memory for training": f"{file_size(memory.kept)} (fp32 weights, "
            f"gradients, AdamW) + {file_size(memory.activations)} per row of the micro-batch",
            "weights": weights,
            **_base_weights(run),
        }
    )


def _base_weights(run: Run) -> dict[str, str]:
    """The file of the weights before training, if a part of them is trained."""
    path = run.path / layout.BASE
    if not path.is_file():
        return {}
    form = f", blocks in {run.tuning.quantize}" if run.tuning.quantize else ""
    return {"weights before training": f"{path.name}, {file_size(path.stat().st_size)}{form}"}


def _last_metrics(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The last value of each column of metrics.csv, and the best validation."""
    last = {n: value for row in rows for n, value in row.items() if value is not None}
    shown = {name: _number(value) for name, value in last.items()}
    scores = [(row["val_loss"], row["step"]) for row in rows if row["val_loss"] is not None]
    if scores:
        loss, step = min(scores)
        shown["best val_loss"] = f"{loss:.4f} at step {step:,}"
    rewards = [
        (row["val_reward"], -row["step"]) for row in rows if row.get("val_reward") is not None
    ]
    if rewards:
        reward, earliest = max(rewards)
        shown["best val_reward"] = f"{reward:.4f} at step {-earliest:,}"
    return properties(shown)


def _checkpoints(run: Run) -> RenderableType:
    """Steps, sizes, and whether the files are intact."""
    table = Table.grid(padding=(0, 2))
    for folder in sorted(run.checkpoints.glob("step-*")):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and folder.is_dir():
            try:
                size = sum(file.stat().st_size for file in folder.iterdir())
                problem = checkpoint.verify(folder, int(number))
            except FileNotFoundError:
                continue
            if problem is None or folder.exists():  # else pruned by the process that trains here
                state = Text(f"damaged: {problem}", "red") if problem else Text("intact")
                table.add_row(f"step {int(number):,}", file_size(size), state)
    return table if table.row_count else Text("none")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

"""`gptsmith inspect`: what a prepared corpus or a run folder holds, counted and shown."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptsmith import files
from gptsmith.data.statistics import CorpusReport, Sample, SplitStatistics, corpus_report
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

_BAR = 40  # characters of the longest bar
_LINE_ENDS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
_SPACES = str.maketrans({" ": "·"}) | _LINE_ENDS


@dataclass(frozen=True)
class StoredStep:
    """A checkpoint on disk; `damage` says what is wrong with it, None: nothing."""

    step: int
    size: int
    damage: str | None


@dataclass(frozen=True)
class RunReport:
    """memory: one training row of context_length tokens in fp32; metrics: the last row, merged."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    parameters: int
    flops_per_token: int
    memory: TrainingMemory
    cache_bytes: int
    metrics: dict[str, Any]
    best: tuple[float, int] | None
    checkpoints: list[StoredStep]
    weights_bytes: int | None


def inspect(path: str | Path, console: Console | None = None) -> CorpusReport | RunReport:
    """The report on whichever of the two `path` is; errors say what it is instead."""
    path = Path(path)
    corpus = (path / "manifest.json").is_file() and not (path / checkpoint.STATE).is_file()
    if corpus or (path / "progress.json").is_file():
        return corpus_report(path, console=console)
    return run_report(path)


def run_report(path: str | Path) -> RunReport:
    """Architecture, cost, last metrics and stored steps of a run; every checkpoint is verified."""
    run = Run.open(path)
    c = run.model_config
    rows = monitor.table(monitor.read_events(run.metrics))
    scores = [(row["val_loss"], row["step"]) for row in rows if row["val_loss"] is not None]
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    stored = []
    for folder in sorted(run.checkpoints.glob("step-*")):
        step = folder.name.removeprefix("step-")
        if step.isdigit() and folder.is_dir():
            size = sum(file.stat().st_size for file in folder.iterdir())
            stored.append(StoredStep(int(step), size, checkpoint.verify(folder, int(step))))
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
    )


def show(report: CorpusReport | RunReport, console: Console, top: int = 20) -> None:
    """Print the report; `top`: how many of the most frequent tokens."""
    parts = _corpus(report, top) if isinstance(report, CorpusReport) else _run(report)
    with console.capture() as capture:
        console.print(Group(*parts))
    # rich fills every line with spaces, which in a file or a pipe are in the way
    lines = [line.rstrip(" ") for line in capture.get().split("\n")]
    console.out("\n".join(lines), end="", highlight=False)


def draw(report: CorpusReport, path: str | Path) -> Path:
    """Write a PNG: how long the documents are, and how often the n-th most frequent token occurs
    (a straight line in these axes is Zipf's law)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path}: the picture is a PNG, give it a name that ends in .png")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = {s.name: np.maximum(s.lengths, 1) for s in report.splits.values() if s.documents}
    decades = _decades(np.concatenate(list(lengths.values())))
    for name, of_split in lengths.items():
        share = np.full(len(of_split), 1 / len(of_split))  # val is much smaller
        bins = np.geomspace(*decades, 40).tolist()
        left.hist(of_split, bins=bins, weights=share, histtype="step", label=name)
    left.set(title="document lengths", xlabel="tokens in a document", xscale="log", xlim=decades)
    left.set(ylabel="share of the documents")
    left.legend()
    frequencies = np.sort(report.counts[report.counts > 0])[::-1]
    right.loglog(np.arange(1, len(frequencies) + 1), frequencies, marker=".", markersize=3)
    right.set(title="token frequencies", xlabel="rank of the token", ylabel="occurrences")
    right.set(xlim=(1, max(10, len(frequencies))), ylim=_decades(frequencies))
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"{report.path.name}: {int(report.counts.sum()):,} tokens")
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _decades(numbers: np.ndarray) -> tuple[int, int]:
    """The powers of ten around positive numbers: an axis of less would have no labels."""
    low, high = int(numbers.min()), int(numbers.max())
    return 10 ** (len(str(low)) - 1), 10 ** len(str(high))


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, documents) over bins 0, 1, 2-3, 4-7, 8-15 ... that cover `lengths`."""
    if not len(lengths):
        return []
    bins = np.frexp(lengths.astype(np.float64))[1]  # 0 for 0, k for 2^(k-1) <= length < 2^k
    counts = np.bincount(bins)
    first = int(np.flatnonzero(counts)[0])
    edges = [(0, 0)] + [(2 ** (k - 1), 2**k - 1) for k in range(1, len(counts))]
    return [(*edges[k], int(counts[k])) for k in range(first, len(counts))]


def visible(tokenizer: Tokenizer, token_id: int) -> str:
    """One token as text in which spaces, line ends and parts of a character can be seen."""
    data = tokenizer.decode_bytes([token_id])
    try:
        return printable(data.decode())
    except UnicodeDecodeError:
        return repr(data)[2:-1]


def printable(text: str, marks: dict[int, str] = _SPACES, keep: str = "") -> str:
    """Nothing in a corpus shall steer the terminal, but for the characters of `keep`."""
    text = text.translate(marks)
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


def _corpus(report: CorpusReport, top: int) -> Iterable[RenderableType]:
    manifest, tokenizer = report.manifest, report.tokenizer
    yield _title(f"corpus {manifest.get('name') or report.path.name}", report.path)
    total = int(report.counts.sum())
    facts = {
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids ({manifest['dtype']})",
        "vocabulary in use": f"{report.used:,} ids, {report.used / tokenizer.vocab_size:.1%}; "
        + ", ".join(f"{report.needed(s):,} make up {s:.0%}" for s in (0.5, 0.9, 0.99)),
        "val tokens unseen in train": f"{report.unseen:.2%}",
        "val documents also in train": f"{report.leaked:,}",
    }
    yield _facts(facts)
    yield _splits(report.splits.values())
    if report.splits["train"].documents > 1:
        yield _heading("document lengths (train, tokens)")
        yield bars(report.splits["train"].lengths)
    yield _heading(f"most frequent tokens of {total:,}")
    yield _frequencies(report, top, total)
    yield _heading("training pairs: the model sees x and learns y, one token further on")
    for sample in report.samples:
        yield _pair(sample, tokenizer)


def _splits(splits: Iterable[SplitStatistics]) -> Table:
    columns = []
    for split in splits:
        lengths = split.lengths if split.documents else np.zeros(1)
        low, median, p90, high = (f"{np.quantile(lengths, q):,.0f}" for q in (0, 0.5, 0.9, 1))
        rate = split.duplicates / max(1, split.documents)
        columns.append(
            {
                "": split.name,
                "tokens": f"{split.tokens:,}",
                "shards": f"{split.shards:,}",
                "text": _size(split.text_bytes),
                "bytes per token": f"{split.text_bytes / max(1, split.tokens):.3f}",
                "documents": f"{split.documents:,}",
                "exact duplicates": f"{split.duplicates:,} ({rate:.1%})",
                "tokens in a document": f"{low} to {high}, median {median}, 90% up to {p90}",
            }
        )
    table = Table.grid(padding=(0, 2))
    for name in columns[0]:
        table.add_row(Text(name, "dim"), *(Text(column[name]) for column in columns))
    return table


def bars(lengths: np.ndarray) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = histogram(lengths)
    most = max(count for *_, count in rows)
    for first, last, count in rows:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        table.add_row(Text(f"{first:,}-{last:,}", justify="right"), bar, f"{count:,}")
    return table


def _frequencies(report: CorpusReport, top: int, total: int) -> Table:
    table = Table.grid(padding=(0, 3))
    rows = [
        Text.assemble(
            f"{rank:>3}  ",
            (visible(report.tokenizer, i), "bold"),
            (f"  {count / total:.2%}  id {i}", "dim"),
        )
        for rank, (i, count) in enumerate(report.top(top), start=1)
    ]
    height = -(-len(rows) // 2)
    for left in range(height):
        table.add_row(*rows[left::height])
    return table


def _pair(sample: Sample, tokenizer: Tokenizer) -> RenderableType:
    """Both texts whole, then the first tokens as columns in which y stands one to the left."""
    whole = Table.grid(padding=(0, 1))
    for name, ids in (("x", sample.x), ("y", sample.y)):
        text = printable(tokenizer.decode(ids), _LINE_ENDS)
        whole.add_row(Text(name, "bold cyan"), Text(text, overflow="fold"))
    aligned = Table.grid(padding=(0, 1))
    first = slice(0, 8)
    for name, ids in (("x", sample.x[first]), ("y", sample.y[first])):
        cells = [Text(visible(tokenizer, i), "reverse") for i in ids]
        aligned.add_row(Text(name, "bold cyan"), *cells, "…")
    place = Text(f"{sample.place}, token {sample.start:,}", "dim")
    return Padding(Group(place, whole, aligned), (0, 0, 1, 0))


def _run(report: RunReport) -> Iterable[RenderableType]:
    c, memory = report.model, report.memory
    yield _title("run", report.path)
    heads = f"{c.n_head} heads" + (f" ({c.K} key/value)" if c.n_head != c.K else "")
    parts = [
        c.norm,
        c.mlp,
        c.position,
        f"bias {c.bias}",
        "tied" if c.tie_embeddings else "untied",
    ]
    yield _facts(
        {
            "architecture": f"{c.n_layer} layers, {c.n_embd} wide, {heads} of {c.D}, MLP {c.F}, "
            f"context {c.context_length:,}",
            "": ", ".join([*parts, *(["QK-norm"] if c.qk_norm else []), f"mask {c.mask}"]),
            "tokenizer": f"{report.tokenizer.kind}, {report.tokenizer.vocab_size:,} ids "
            f"(the model has {c.vocab_size:,})",
            "parameters": f"{report.parameters:,}",
            "training one token": f"{report.flops_per_token / 1e6:,.1f} MFLOP at full context",
            "memory to use it": f"weights {_size(memory.weights)} in fp32, "
            f"{_size(memory.weights // 2)} in bf16; "
            f"cache {_size(report.cache_bytes)} per text at full context",
            "memory to train it": f"{_size(memory.total - memory.activations)} (fp32 weights, "
            f"gradients, AdamW) + {_size(memory.activations)} per row of the micro-batch",
            "weights": "none: the run is unfinished, resume it"
            if report.weights_bytes is None
            else f"model.safetensors, {_size(report.weights_bytes)}",
        }
    )
    if report.metrics:
        yield _heading("last metrics")
        shown = {name: _number(value) for name, value in report.metrics.items()}
        if report.best:
            shown["best val_loss"] = f"{report.best[0]:.4f} at step {report.best[1]:,}"
        yield _facts(shown)
    yield _heading("checkpoints")
    table = Table.grid(padding=(0, 2))
    for stored in report.checkpoints:
        state = Text(f"damaged: {stored.damage}", "red") if stored.damage else Text("whole")
        table.add_row(f"step {stored.step:,}", _size(stored.size), state)
    yield table if report.checkpoints else Text("none")


def _title(name: str, path: Path) -> Text:
    return Text.assemble((name, "bold"), "  ", (str(path), "dim"))


def _heading(text: str) -> Padding:
    return Padding(Text(text, "bold"), (1, 0, 0, 0))


def _facts(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, "dim"), Text(value))
    return table


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"

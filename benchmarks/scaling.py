"""The scaling laws behind the expected loss of `gptsmith plan`: a sweep, the fit, what it misses.

    python -m benchmarks scaling --out DIR [--corpora NAME...] [--fit-only] [--update]

On two corpora, models of three depths are trained on three numbers of tokens each, by the rules of
`plan` (budget/rules.py), then some more that the fit does not see. One thread. Run the same command
again to continue where it was stopped. Prints the tables of docs/log.md and draws their picture,
DIR/scaling.png. --update writes the laws to budget/scaling_laws.json, where `plan` reads them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from gptsmith import files
from gptsmith.budget import rules
from gptsmith.budget.scaling_law import FITTED as KNOWN
from gptsmith.budget.scaling_law import LAWS, Point, ScalingLaw, fit
from gptsmith.commands import prepare, pretrain
from gptsmith.data.shards import Corpus
from gptsmith.model.flops import flops_per_token, matmul_parameters
from gptsmith.run import layout
from gptsmith.train import checkpoint
from gptsmith.train.monitor import read_events

ROOT = Path(__file__).resolve().parents[1]
TOKENIZERS = {"shakespeare": "char"}  # others: bytes
FITTED = [(depth, tokens) for tokens in (150e3, 500e3, 1.5e6) for depth in (1, 2, 3)]
HELD_OUT = [(2, 1e6), (3, 800e3), (4, 500e3), (2, 4e6), (3, 3e6)]


def cost(size: tuple[int, float]) -> float:
    """FLOPs of a run, about."""
    depth, tokens = size
    return tokens * flops_per_token(rules.shape(depth, 257))


def corpus(name: str, folder: Path) -> Corpus:
    path = folder / "data" / name
    if not (path / "manifest.json").exists():
        prepare.main([name, "--tokenizer", TOKENIZERS.get(name, "byte"), "--out", str(path)])
    return Corpus.open(path)


def run_folder(data: Corpus, depth: int, tokens: float, folder: Path) -> Path:
    return folder / "runs" / f"{data.path.name}-{depth}-{tokens / 1e6:g}M"


def run(data: Corpus, depth: int, tokens: float, folder: Path) -> None:
    """Train the run of this size, unless it is finished; resumed if it was stopped."""
    out = run_folder(data, depth, tokens, folder)
    if (out / layout.WEIGHTS).exists():
        return
    design = rules.design(depth, data.tokenizer.vocab_size, tokens)
    recipe = folder / f"{out.name}.yaml"
    files.write_text(recipe, layout.yaml_text(design.recipe()))
    words = [recipe, "--data", data.path, "--out", out, "--train.num-threads", 1]
    words += ["--train.compile", "off", "--monitor.trackers", "none"]
    words += ["--eval.interval", 0, "--eval.tokens", 10_000, "--eval.sample-tokens", 0]
    words += ["--resume"] if checkpoint.steps(out / "checkpoints") else []
    if code := pretrain.main([str(word) for word in words], time.perf_counter()):
        raise SystemExit(code)


def point(out: Path) -> Point:
    """What a finished run has reached, on at least 100,000 tokens of the validation split."""
    events = read_events(out / "metrics.jsonl")
    loss = [event["val_loss"] for event in events if event["event"] == "val"][-1]
    tokens = [event["tokens"] for event in events if event["event"] == "train"][-1]
    return Point(
        matmul_parameters(layout.read_architecture(out / layout.ARCHITECTURE)), tokens, loss
    )


def measured(fitted: dict[str, Point], held_out: dict[str, Point], data: Corpus) -> ScalingLaw:
    """The law of the fitted runs, for the sizes and tokens of all. Its error: the largest one of
    the runs that it was not fitted to; of the fitted ones, left out one at a time, while there are
    no others. At least 3%."""
    points, misses = list(fitted.values()), []
    law = fit(points)
    for p in held_out.values():
        misses.append(abs(law.loss(p.N, p.D) / p.loss - 1))
    for i, p in enumerate([] if misses else points):
        misses.append(abs(fit(points[:i] + points[i + 1 :]).loss(p.N, p.D) / p.loss - 1))
    N, D, _ = zip(*points, *held_out.values(), strict=True)
    train = data.manifest["splits"]["train"]
    return replace(
        law, error=max(0.03, *misses), N=(min(N), max(N)), D=(min(D), max(D)),
        bytes_per_token=train["bytes"] / train["tokens"],
    )  # fmt: skip


def table(law: ScalingLaw, named: dict[str, Point]) -> str:
    """Each run, and by how much the law misses it."""
    lines = ["| run | parameters | tokens | loss | law | error |", "|---|---:|---:|---:|---:|---:|"]
    for name, (N, D, loss) in named.items():
        expected = law.loss(N, D)
        found = f"{loss:.4f} | {expected:.4f} | {expected / loss - 1:+.1%}"
        lines.append(f"| {name} | {N:,.0f} | {D:,} | {found} |")
    return "\n".join(lines)


def draw(laws: dict[str, tuple[ScalingLaw, list[Point], list[Point]]], path: Path) -> None:
    """Losses over tokens with the law's curves, and the errors below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(5 * len(laws), 6), layout="constrained")
    axes = figure.subplots(2, len(laws), sharex="col", height_ratios=(3, 1), squeeze=False)
    for column, (name, (law, fitted, held_out)) in enumerate(laws.items()):
        above, below = axes[0, column], axes[1, column]
        above.set(title=name, ylabel="validation loss, nats per token", xscale="log")
        below.set(xlabel="training tokens", ylabel="law / run - 1", xscale="log")
        below.axhline(0, color="grey", linewidth=0.5)
        below.xaxis.set_minor_formatter(NullFormatter())
        sizes = sorted({p.N for p in fitted + held_out})
        for i, N in enumerate(sizes):
            D = np.geomspace(law.D[0], max(p.D for p in fitted + held_out), 50)
            above.plot(D, [law.loss(N, d) for d in D], color=f"C{i}", label=f"{N / 1e6:.2f}M")
            for points, marker in ((fitted, "o"), (held_out, "x")):
                of_size = [p for p in points if p.N == N]
                tokens = [p.D for p in of_size]
                above.plot(tokens, [p.loss for p in of_size], marker, color=f"C{i}")
                errors = [law.loss(p.N, p.D) / p.loss - 1 for p in of_size]
                below.plot(tokens, errors, marker, color=f"C{i}")
        above.legend(title="parameters; x: not in the fit")
    files.write_figure(path, figure, dpi=80)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpora", nargs="+", default=["shakespeare", "wikitext-2"])
    parser.add_argument("--fit-only", action="store_true", help="of the runs that are finished")
    parser.add_argument("--update", action="store_true", help=f"write {KNOWN.name}")
    options = parser.parse_args(argv)
    os.environ.setdefault("GPTSMITH_DATA", str(ROOT.parent / "shared" / "data"))
    options.out.mkdir(parents=True, exist_ok=True)
    corpora = [corpus(name, options.out) for name in options.corpora]
    if not options.fit_only:
        for depth, tokens in sorted(FITTED + HELD_OUT, key=cost):
            for data in corpora:
                run(data, depth, tokens, options.out)
    laws, known = {}, dict(LAWS)
    for data in corpora:
        found: list[dict[str, Point]] = []
        for sizes in (FITTED, HELD_OUT):
            outs = [run_folder(data, *size, options.out) for size in sizes]
            found.append({o.name: point(o) for o in outs if (o / layout.WEIGHTS).exists()})
        fitted, held_out = found
        law = measured(fitted, held_out, data)
        laws[data.path.name] = law, list(fitted.values()), list(held_out.values())
        print(f"\n{data.path.name}, fingerprint {data.fingerprint}\n{law}\n")
        print(table(law, fitted), "\nnot in the fit:", table(law, held_out), sep="\n")
        known[data.fingerprint] = law
    draw(laws, options.out / "scaling.png")
    if options.update:
        files.write_json(KNOWN, {name: asdict(law) for name, law in known.items()})


if __name__ == "__main__":
    main(sys.argv[1:])

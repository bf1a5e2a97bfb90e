"""Training on many GPUs, on paper: time of a step and memory per rank. Nothing is measured here;
docs/scaling.md gives the assumptions, and its tables are this output.
"""

from __future__ import annotations

from gptsmith.budget.step_time import Cluster, step_time
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import training_memory
from gptsmith.train.loss import CHUNK_BYTES

CASES = (("gpt2", 32, 524_288), ("gpt2-medium", 16, 524_288), ("gpt2-xl", 8, 1_048_576))
RANKS = (1, 8, 64, 1024)


def time_table() -> str:
    """Rows of ranks; at least one micro-batch per rank, so the step grows where it must."""
    cluster = Cluster()
    lines = [
        "| model | GPUs | tokens a step | compute | reduced (not hidden) | update "
        "| tokens/s | linear |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, B, tokens in CASES:
        c = ModelConfig.preset(name)
        alone = 0.0
        for ranks in RANKS:
            micro_batches = max(1, tokens // (ranks * B * c.context_length))
            s = step_time(c, ranks, B, micro_batches, cluster)
            alone = alone or s.tokens_per_second
            lines.append(
                f"| {name} | {ranks:,} | {s.tokens:,} | {1e3 * s.compute:,.0f} ms | "
                f"{1e3 * s.reduction:,.1f} ({1e3 * s.exposed:,.1f}) ms | "
                f"{1e3 * s.optimizer:,.1f} ms | {s.tokens_per_second:,.0f} | "
                f"{s.tokens_per_second / (ranks * alone):.0%} |"
            )
    return "\n".join(lines)


def memory_table() -> str:
    """GiB per rank; the last with --train.shard."""
    lines = [
        "| model, micro-batch | weights | gradients | AdamW | activations, logits | one rank "
        "| each of 64 | each of 64, sharded |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, B, _ in CASES:
        c = ModelConfig.preset(name)
        m, sharded = (
            training_memory(
                c,
                B,
                c.context_length,
                autocast="cuda",
                shards=shards,
                chunk_bytes=CHUNK_BYTES["cuda"],
            )
            for shards in (1, 64)
        )
        sizes = (m.weights, m.gradients, m.optimizer, m.activations + m.logits, m.total)
        shown = " | ".join(f"{size / 2**30:.1f}" for size in sizes)
        owned = m.total - m.optimizer * 63 / 64
        last = f"{owned / 2**30:.1f} | {sharded.total / 2**30:.1f}"
        lines.append(f"| {name}, {B} x {c.context_length} | {shown} | {last} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    print(time_table())
    print()
    print(memory_table())

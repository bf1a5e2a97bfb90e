"""The time of a training step on paper: a roofline of one device, and the network of several.

A step of N ranks computes its tokens, adds up the gradients (a ring: every rank sends and receives
2 (N-1)/N of them, in fp32) while the backward pass of its last micro-batch runs. Each weight is
updated by one rank, which then sends it to all others. If the model is sharded, each micro-batch
gathers the weights twice and reduces the gradients once, block by block, while it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import block_matrices, flops_per_token, parameters


@dataclass(frozen=True)
class Cluster:
    """peak: bf16 FLOP/s of a device. mfu: the share that training reaches on one. memory: bytes/s
    of its memory. inside, between: bytes/s at which a rank reduces within a machine and over the
    network. latency: seconds of a message. per_machine: devices."""

    peak: float = 989e12
    mfu: float = 0.42
    memory: float = 3.3e12
    inside: float = 300e9
    between: float = 40e9
    latency: float = 20e-6
    per_machine: int = 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. exposed: the part of the reduction that the backward pass does not hide.
    optimizer: until all ranks have the new weights."""

    compute: float
    reduction: float
    exposed: float
    optimizer: float
    tokens: int

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


def step_time(
    c: ModelConfig,
    ranks: int,
    B: int,
    micro_batches: int,
    cluster: Cluster,
    kind: str = "adamw",
    *,
    sharded: bool = False,
    checkpointing: bool = False,
) -> StepTime:
    """One step in which every rank computes `micro_batches` of B rows.

    kind: of the optimizer, whose work is divided among the ranks by whole parameters. sharded: as
    by train.shard. checkpointing: of activations, whose forward pass is computed twice.
    """
    T, n = c.context_length, parameters(c)
    rows = B * micro_batches
    compute = rows * T * flops_per_token(c) / (cluster.peak * cluster.mfu)
    compute *= 4 / 3 if checkpointing else 1
    bandwidth = cluster.inside if ranks <= cluster.per_machine else cluster.between
    moved = (ranks - 1) / ranks * 4 * n / bandwidth  # all weights, or all gradients, once
    delay = (ranks.bit_length() - 1) * cluster.latency
    if ranks == 1:
        reduction = exposed = 0.0
    elif sharded:
        reduction = 3 * micro_batches * (moved + c.n_layer * delay)
        first_block = micro_batches * moved / c.n_layer  # gathered before there is work
        exposed = max(reduction - compute, first_block)
    else:
        reduction = 2 * (moved + delay)
        hidden = compute / micro_batches * 2 / 3  # the backward pass of the last micro-batch
        last_bucket = min(1.0, 25e6 / (4 * n)) * reduction  # DistributedDataParallel's, sent last
        exposed = max(reduction - hidden, last_bucket)
    optimizer = 7 * 4 * n / cluster.memory  # reads weight, gradient, moments; writes all but one
    if kind == "muon":
        # 5 iterations of X X^T, its square and a product with X, in bf16 at half of the peak:
        # about 6 m m n each for a matrix of m <= n, with m about the width of the model
        optimizer += 5 * 6 * c.n_embd * block_matrices(c) / (0.5 * cluster.peak)
    # weights to all ranks; or Muon's gradients to the rank that computes an update, and this back
    sent = 2 * moved / ranks if sharded else moved
    return StepTime(compute, reduction, exposed, optimizer / ranks + sent, rows * T * ranks)

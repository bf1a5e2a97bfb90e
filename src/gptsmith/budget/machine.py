"""What a machine computes: matrix products, memory, a real training step.

A machine that is here is measured for a few seconds; of others, published peaks are known.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from gptsmith.batch import Batch
from gptsmith.budget.rules import Design
from gptsmith.budget.step_time import Cluster, step_time
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.terminal import counted
from gptsmith.train import runtime
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.step import train_steps

# Of a process that trains on a CPU, besides what it imports: tokenizer, metrics, the kernels that
# write samples, the corpus that evaluations read; and what torch.compile imports (docs/log.md).
_OTHER_BYTES, _COMPILER_BYTES = 105_000_000, 120_000_000


@dataclass(frozen=True)
class Machine:
    """Where a run is planned.

    device_type: cpu, cuda or mps. memory: bytes that a rank may use, None if unknown. shares: depth
    -> share of `cluster.peak` that a training step reached; empty: `cluster.mfu` is an assumption.
    startup: seconds from the command to the first step. base_memory: bytes of a process that has
    imported what training needs and has no model yet. heap: a process on a CPU keeps so many
    times the activations of a step. eager: steps are not compiled. low_precision: bf16 or fp16.
    """

    name: str
    device_type: str
    cluster: Cluster
    memory: int | None
    ranks: int = 1
    shares: Mapping[int, float] = field(default_factory=dict)
    low_precision: bool = True
    startup: float = 0.0
    base_memory: int = 0
    heap: float = 1.5
    eager: bool = True

    def share(self, c: ModelConfig) -> float:
        """The share of the peak that a step of this model reaches: measured, or interpolated
        between models that were, by depth."""
        if not self.shares:
            return self.cluster.mfu * min(1.0, c.n_embd / 768)  # measured with GPT-2's width
        below = max((d for d in self.shares if d <= c.n_layer), default=min(self.shares))
        above = min((d for d in self.shares if d >= c.n_layer), default=max(self.shares))
        if above == below:
            return self.shares[above]
        part = (c.n_layer - below) / (above - below)
        return self.shares[below] * (1 - part) + self.shares[above] * part

    def step_seconds(self, design: Design) -> float:
        """Seconds of an optimizer step."""
        cluster = replace(self.cluster, mfu=self.share(design.model))
        micro_batches = -(-design.micro_batches // self.ranks)
        return step_time(
            design.model, self.ranks, design.batch_size, micro_batches, cluster, "muon",
            sharded=design.sharded, checkpointing=design.checkpointing,
        ).total  # fmt: skip

    def measured(self, design: Design, steps: int = 5) -> Machine:
        """The same machine, which knows how long a step of this design takes here."""
        step = measure_step(
            design.model, design.batch_size, design.micro_batches,
            checkpointing=design.checkpointing, steps=steps,
        )  # fmt: skip
        return replace(self, shares={**self.shares, design.depth: self._share(design, step)})

    def compiled(self, design: Design) -> Machine:
        """The same machine, running compiled steps: all are taken to be faster by as much as those
        of this design, which is measured. Compiling them counts as a part of the start."""
        step = measure_step(
            design.model, design.batch_size, design.micro_batches,
            checkpointing=design.checkpointing, compile=True,
        )  # fmt: skip
        gain = self._share(design, step) / self.share(design.model)
        shares = {depth: gain * share for depth, share in self.shares.items()}
        return replace(
            self, shares=shares, startup=self.startup + step.first - step.seconds,
            base_memory=self.base_memory + _COMPILER_BYTES, heap=1.15, eager=False,
        )  # fmt: skip

    def _share(self, design: Design, step: MeasuredStep) -> float:
        """The share of the peak with which step_time gives the measured time."""
        ideal = step_time(
            design.model, 1, design.batch_size, design.micro_batches,
            replace(self.cluster, mfu=1.0), "muon", checkpointing=design.checkpointing,
        )  # fmt: skip
        # at least a tenth of it: the optimizer's part is an estimate
        computing = max(step.seconds - ideal.optimizer, 0.1 * step.seconds)
        return ideal.compute / computing


class MeasuredStep(NamedTuple):
    """Seconds: the median of some steps, and the first one, which may include compiling."""

    seconds: float
    first: float


def measure_step(
    c: ModelConfig,
    B: int,
    micro_batches: int = 1,
    *,
    compile: bool = False,
    checkpointing: bool = False,
    steps: int = 5,
) -> MeasuredStep:
    """Train a model on random tokens on this machine, micro-batches (B, T), for a few steps."""
    device = runtime.choose_device("auto")
    if device.type == "cpu":
        runtime.keep_freed_memory()  # as training does
    model = GPTModel(c).to(device)
    model.activation_checkpointing = checkpointing
    rows = torch.randint(c.vocab_size, (B, c.context_length + 1))
    batch = Batch(rows[:, :-1], rows[:, 1:].contiguous())
    loss = runtime.compiled(next_token_loss) if compile else next_token_loss
    running = train_steps(
        model, loss, lambda step: [batch] * micro_batches,
        Optimizer(model, OptimConfig(), device.type),
        learning_rate=lambda step: 1e-3, max_grad_norm=1.0, seed=0,
        precision=runtime.choose_precision("auto", device),
    )  # fmt: skip
    times = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        next(running)
        times.append(time.perf_counter() - began)
    first, *rest = times  # the first one also allocates memory
    return MeasuredStep(sorted(rest)[len(rest) // 2], first)


def matrix_product_flops(device: torch.device) -> float:
    """FLOP/s of the best of several large square matrix products, in the number format that
    `precision auto` takes here."""
    dtype = runtime.choose_precision("auto", device).dtype
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(6, lambda: a @ b, device)


def copy_bytes(device: torch.device) -> float:
    """Bytes/s of the best of several copies of 256 MiB, all threads at work."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return source.numel() / _best(6, lambda: target.copy_(source), device)


def _best(times: int, work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of several executions."""
    best = float("inf")
    for _ in range(times):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def this_machine(started: float, memory: int | None = None) -> Machine:
    """Matrix products and memory of this machine, measured; no steps yet.

    started: time.perf_counter() at which the command began: `pretrain` needs as long to start.
    memory: bytes that the run may use (default: all).
    """
    importlib.import_module("matplotlib.figure")  # as training does
    startup = time.perf_counter() - started
    device = runtime.choose_device("auto")
    cluster = Cluster(peak=matrix_product_flops(device), memory=2 * copy_bytes(device))
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    name = f"{device.type}{threads}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return Machine(
        name, device.type, cluster, memory or runtime.memory_bytes(device),
        startup=startup, base_memory=resident_bytes() + _OTHER_BYTES if device.type == "cpu" else 0,
        low_precision=runtime.choose_precision("auto", device).name != "fp32",
    )  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process, as far as the system says."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak so far
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

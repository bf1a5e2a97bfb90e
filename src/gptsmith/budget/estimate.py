"""What a run takes and what it reaches: time, memory, disk, loss; and which run a budget buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gptsmith.budget import rules
from gptsmith.budget.machine import Machine
from gptsmith.budget.rules import Design
from gptsmith.budget.scaling_law import ScalingLaw
from gptsmith.model.flops import TrainingMemory, flops_per_token, matmul_parameters, training_memory
from gptsmith.recipes.options import SaveConfig
from gptsmith.train import runtime
from gptsmith.train.loss import CHUNK_BYTES

# Seconds of an evaluation besides the model's forward passes (figure, metrics), as a share of the
# command's start-up, which is as fast or slow as the machine.
EVALUATION_PER_STARTUP = 0.15
_LONGEST_MEASURED_STEP = 5.0  # seconds; the times of longer ones are extrapolated


@dataclass(frozen=True)
class Budget:
    """What may be spent, and on which text.

    One of seconds, tokens and parameters is given, or none: then memory alone decides.
    corpus_tokens: of the training split; None: more than can be read. vocab_size: None: by
    `rules.vocabulary`.
    """

    seconds: float | None = None
    tokens: int | None = None
    parameters: int | None = None
    corpus_tokens: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What training a design takes on a machine. memory: bytes of a rank at the peak. disk: bytes
    of the run folder at most. loss, loss_error: expected, in nats per token, and relative; None
    where no scaling law is known."""

    design: Design
    seconds: float
    tokens_per_second: float
    memory: int
    disk: int
    loss: float | None
    loss_error: float | None


def estimate(design: Design, machine: Machine, law: ScalingLaw | None) -> Estimate:
    step = machine.step_seconds(design)
    N = matmul_parameters(design.model)
    expected = law.loss(N, design.tokens) if law and law.covers(N, design.tokens) else None
    return Estimate(
        design,
        run_seconds(design, machine),
        design.batch_tokens / step,
        peak_memory(design, machine),
        disk_bytes(design),
        expected,
        law.error if law and expected is not None else None,
    )


def run_seconds(design: Design, machine: Machine) -> float:
    """From the command to its end: start, steps, evaluations."""
    step = machine.step_seconds(design)
    evaluations = math.ceil(design.steps / design.eval_interval) + 1  # one before training
    tokens = design.eval_tokens * (evaluations + 10)
    # a forward pass is a third of the products of a step
    forward = tokens * flops_per_token(design.model) / 3
    forward /= machine.cluster.peak * machine.share(design.model)
    shown = evaluations * EVALUATION_PER_STARTUP * machine.startup
    return machine.startup + design.steps * step + forward + shown


def step_memory(design: Design, machine: Machine) -> TrainingMemory:
    c, kind = design.model, machine.device_type
    return training_memory(
        c, design.batch_size, c.context_length, "muon",
        autocast=kind if machine.low_precision else None, checkpointing=design.checkpointing,
        shards=machine.ranks if design.sharded else 1,
        chunk_bytes=CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]),
        accumulates=design.micro_batches > machine.ranks, eager=machine.eager,
    )  # fmt: skip


def peak_memory(design: Design, machine: Machine) -> int:
    """Bytes of a rank at the peak: on a GPU, of its memory; else of the process, with the copy that
    a checkpoint is written from. What a process keeps for its next step (see
    `runtime.keep_freed_memory`) was measured with models of 0.1 to 11M parameters: within 10%
    (docs/log.md)."""
    memory = step_memory(design, machine)
    if machine.device_type == "cuda":
        return memory.total
    computing = machine.heap * (memory.activations + memory.logits)
    copy = memory.weights + memory.optimizer
    return machine.base_memory + memory.kept + int(computing + 0.55 * memory.update) + copy


def disk_bytes(design: Design) -> int:
    """Of the final weights and of all checkpoints: the newest, the best, and one being written."""
    memory = training_memory(design.model, 1, 1, "muon")
    return memory.weights + (SaveConfig().keep_last + 2) * (memory.weights + memory.optimizer)


def fitting(depth: int, vocab_size: int, tokens: float, machine: Machine) -> Design | None:
    """The design with the largest micro-batch that fits the machine's memory; None if not even a
    row does, with activation checkpointing. Several devices hold the whole model each, or a part of
    it where the whole does not fit."""
    for checkpointing in (False, True):
        design = _largest_rows(depth, vocab_size, tokens, machine, checkpointing, sharded=False)
        if design is not None:
            return design
    if machine.ranks == 1:
        return None
    # The smaller a micro-batch, the more often the weights are gathered: computing activations
    # again may save more time than it takes.
    parts = [
        _largest_rows(depth, vocab_size, tokens, machine, checkpointing, sharded=True)
        for checkpointing in (False, True)
    ]
    fitting = [design for design in parts if design is not None]
    return min(fitting, key=lambda d: machine.step_seconds(d) / d.batch_tokens, default=None)


def _largest_rows(
    depth: int,
    vocab_size: int,
    tokens: float,
    machine: Machine,
    checkpointing: bool,
    sharded: bool,
) -> Design | None:
    rows: int | None = None if machine.device_type == "cpu" else 64
    while True:
        found = rules.design(depth, vocab_size, tokens, rows, machine.ranks)
        found = replace(found, checkpointing=checkpointing, sharded=sharded)
        if machine.memory is None or peak_memory(found, machine) <= 0.9 * machine.memory:
            return found
        if found.batch_size == 1:
            return None
        rows = found.batch_size // 2


def candidates(budget: Budget, machine: Machine, law: ScalingLaw | None) -> list[Estimate]:
    """For each depth, the run that the budget buys with it, as far as it fits the memory.
    ValueError for a corpus that is too small for a step, and for a budget that is too small for any
    model."""
    if budget.corpus_tokens is not None:
        vocab_size = budget.vocab_size or rules.vocabulary(1)[0]
        step = rules.design(1, vocab_size, 1, ranks=machine.ranks).batch_tokens
        if step > rules.MAX_EPOCHS * budget.corpus_tokens:
            raise ValueError(
                f"a corpus of {budget.corpus_tokens:,} training tokens is too small: a step takes "
                f"{step:,}, and text is read at most {rules.MAX_EPOCHS} times; prepare more text"
            )
    found = []
    for depth in range(1, rules.MAX_DEPTH + 1):
        design = longest(depth, budget, machine)
        if design is None:
            break  # deeper ones need more
        found.append(estimate(design, machine, law))
    if not found:
        least = rules.design(1, budget.vocab_size or rules.vocabulary(1)[0], 1, 1, machine.ranks)
        raise ValueError(
            "nothing can be trained with this budget: one step of the smallest model, with the "
            f"start of the command, takes {run_seconds(least, machine):,.0f} s and "
            f"{peak_memory(least, machine) / 1e6:,.0f} MB of memory"
        )
    return found


def longest(depth: int, budget: Budget, machine: Machine) -> Design | None:
    """The run of this depth that the budget buys; None if it is not even one step."""
    vocab_size = budget.vocab_size or rules.vocabulary(depth)[0]
    tokens: float
    if budget.tokens is not None:
        tokens = budget.tokens
    elif budget.seconds is not None:
        tokens = _tokens_in(budget.seconds, depth, vocab_size, machine)
    else:
        N = matmul_parameters(rules.shape(depth, vocab_size))
        tokens = rules.TOKENS_PER_PARAMETER * N
    limit = math.inf
    if budget.corpus_tokens is not None:
        limit = rules.MAX_EPOCHS * budget.corpus_tokens
    tokens = min(tokens, limit)
    design = fitting(depth, vocab_size, tokens, machine) if tokens >= 1 else None
    if design is not None and design.tokens > limit:  # tokens were rounded up to whole steps
        steps = int(limit // design.batch_tokens)
        design = replace(design, tokens=steps * design.batch_tokens) if steps else None
    return design


def _tokens_in(seconds: float, depth: int, vocab_size: int, machine: Machine) -> float:
    """Tokens with which a run of this depth takes so many seconds; 0 if a single step is too long.
    Found by bisection, since the batch depends on their number."""
    low, high = math.log(rules.MIN_BATCH_TOKENS), math.log(1e15)

    def too_long(log_tokens: float) -> bool:
        design = fitting(depth, vocab_size, math.exp(log_tokens), machine)
        return design is None or run_seconds(design, machine) > seconds

    if too_long(low):
        return 0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if too_long(middle) else (middle, high)
    return math.exp(low)


def choose(found: Sequence[Estimate], budget: Budget) -> Estimate:
    """The run whose tokens per parameter are nearest to `rules.TOKENS_PER_PARAMETER`, or whose
    parameters are nearest to those that the budget names; without a time or a size, the largest
    that fits."""

    def distance(each: Estimate) -> float:
        N = matmul_parameters(each.design.model)
        if budget.parameters is not None:
            return abs(math.log(N / budget.parameters))
        return abs(math.log(each.design.tokens_per_parameter / rules.TOKENS_PER_PARAMETER))

    if budget.parameters is None and budget.tokens is None and budget.seconds is None:
        return found[-1]
    return min(found, key=distance)


def with_small_steps(machine: Machine, budget: Budget) -> Machine:
    """This machine with the times of real steps of two small models, which are not compiled."""
    for depth in (2, 4):
        design = fitting(depth, budget.vocab_size or 257, 1e6, machine)
        if design is not None:
            machine = machine.measured(design, steps=3)
    return machine


def calibrated(machine: Machine, budget: Budget) -> Machine:
    """A machine with small steps that also knows the time of a real step of the run that the
    budget buys, compiled if `pretrain` will compile it."""
    measured = None
    for _ in range(3):  # a measurement may change the choice
        chosen = choose(candidates(budget, machine, None), budget).design
        form = chosen.model, chosen.batch_size, chosen.micro_batches
        if form == measured or machine.step_seconds(chosen) > _LONGEST_MEASURED_STEP:
            break
        machine, measured = machine.measured(chosen), form
    work = flops_per_token(chosen.model) * chosen.tokens
    device = torch.device(machine.device_type)
    if form == measured and runtime.choose_compile("auto", device, work, None)[0]:
        machine = machine.compiled(chosen)
    return machine

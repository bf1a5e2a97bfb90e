"""Resolve a configuration for a machine and a dataset, once, at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch

from gptsmith.batch import Batch
from gptsmith.model import flops
from gptsmith.model.config import ModelConfig, Quantization
from gptsmith.recipes.options import RecipeConfig
from gptsmith.terminal import counted
from gptsmith.train import distributed, runtime
from gptsmith.train.loss import CHUNK_BYTES
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Runtime
from gptsmith.train.schedule import Duration, warmup_steps

_FEW_STEPS = 100  # warm-up alone takes 20 by default

R = TypeVar("R", bound=RecipeConfig)
R_co = TypeVar("R_co", bound=RecipeConfig, covariant=True)
Section = Literal[
    "model", "base", "data", "training", "precision", "torch.compile", "evaluation", "resume"
]


class Dataset(Protocol):
    """Training rows of T tokens, in an endless order that depends on the index alone."""

    @property
    def T(self) -> int: ...  # noqa: N802

    @property
    def per_epoch(self) -> int: ...

    def batch(self, first: int, count: int) -> Batch:
        """Rows first..first+count-1."""
        ...

    def position(self, index: int) -> dict[str, int]:
        """Identifies the order of the rows and the place before row `index`; compared on resume."""
        ...


class Note(NamedTuple):
    """A remark for the metrics file and the report of a run."""

    section: Section
    text: str

    def __str__(self) -> str:
        return f"{self.section}: {self.text}"


@dataclass(frozen=True)
class Plan(Generic[R_co]):
    """A configuration in which everything that depends on machine and data is resolved.

    config: complete, as written to config.yaml; a resumed run reuses its values. rows_per_step:
    rows of an optimizer step, over all ranks. saves_in_background: training goes on while a
    checkpoint is written.
    """

    config: R_co
    runtime: Runtime
    duration: Duration
    rows_per_step: int
    saves_in_background: bool
    notes: tuple[Note, ...]

    @property
    def is_sharded(self) -> bool:
        """Whether the model is divided among several ranks."""
        return self.config.train.shard and distributed.world_size() > 1

    def with_notes(self, notes: Iterable[Note]) -> Plan[R_co]:
        """The same plan with more notes, in the order of `Section`."""
        order = get_args(Section).index
        every = sorted((*self.notes, *notes), key=lambda note: order(note.section))
        return replace(self, notes=tuple(every))


def resolve(
    config: R,
    model: ModelConfig,
    dataset: Dataset,
    trained: int | None = None,
    quantize: Quantization | None = None,
) -> Plan[R]:
    """Resolve what depends on machine and data; ValueError for what this machine cannot do.

    trained: number of parameters that are trained (default: all). quantize: format of the blocks'
    matrices. With several ranks, rank 0 chooses for all.
    """
    plan: Plan[R] | None = None

    def choose() -> Mapping[str, Any]:
        nonlocal plan
        plan = _resolve(config, model, dataset, trained, quantize)
        return plan.config.train.model_dump(mode="json")

    chosen = distributed.from_rank_0(choose)
    if plan is None:
        train = type(config.train).model_validate(chosen)
        config = config.model_copy(update=dict(train=train))
        plan = _resolve(config, model, dataset, trained, quantize)
    return plan


def _resolve(
    config: R,
    model: ModelConfig,
    dataset: Dataset,
    trained: int | None,
    quantize: Quantization | None,
) -> Plan[R]:
    train, T, ranks = config.train, dataset.T, distributed.world_size()
    try:
        device = runtime.choose_device(train.device)
    except ValueError as error:
        raise ValueError(f"--train.device: {error}") from None
    if train.deterministic:
        runtime.prepare_determinism()
    if train.num_threads:
        torch.set_num_threads(train.num_threads)
    precision = runtime.choose_precision(train.precision, device)
    multiple = train.batch_size * T
    if train.total_batch_tokens and train.total_batch_tokens % multiple:
        micro_batches = train.total_batch_tokens // multiple + 1
        raise ValueError(
            f"train.total_batch_tokens {train.total_batch_tokens} is not a multiple of batch_size "
            f"x context_length = {multiple}: give {micro_batches * multiple}"
        )
    if not train.total_batch_tokens and ranks > 1 and not config.resume:
        # Recorded, because the step stays as large on any number of ranks.
        train = train.model_copy(update=dict(total_batch_tokens=multiple * ranks))
    rows_per_step = (train.total_batch_tokens or train.batch_size * T) // T
    rows = (train.epochs or config.default_epochs) * dataset.per_epoch
    if train.tokens:
        rows = train.tokens / T
    steps = train.steps or max(1, round(rows / rows_per_step))
    duration = Duration(None if train.seconds else steps, train.seconds)
    length = counted(steps, "step") if duration.steps else f"{train.seconds:,.0f} s"
    work = flops.flops_per_token(model, T) * steps * rows_per_step * T
    compiled, reason = runtime.choose_compile(train.compile, device, work / ranks, train.seconds)
    shards = ranks if train.shard else 1
    memory = _checked_memory(
        config, model, T, trained, quantize, device, precision.name, shards, eager=not compiled
    )
    waits = _saving_notes(config, memory, device, shards)
    mask = "" if model.mask == "causal()" else f", mask {model.mask}"
    notes = (
        Note(
            "model",
            f"{flops.parameters(model):,} parameters, context {model.context_length}, vocabulary "
            f"{model.vocab_size}{mask}; about {memory.total / 2**20:,.0f} MiB to train"
            + (", on each rank" if shards > 1 else ""),
        ),
        Note(
            "training",
            f"{length} of {rows_per_step * T:,} tokens on {device} with "
            f"{counted(torch.get_num_threads(), 'thread')}"
            + (f", on each of {ranks} ranks" if ranks > 1 else "")
            + (", deterministic" if train.deterministic else ""),
        ),
        *_mask_notes(model, dataset, device),
        *_idle_notes(rows_per_step // train.batch_size, ranks),
        *_shard_notes(train.shard, ranks),
        *_length_notes(config, steps),
        *_repetition_notes(rows_per_step, dataset.per_epoch),
        *_warmup_notes(config.optim, duration),
        *waits,
        Note("precision", f"{precision.name}, {precision.reason}"),
        Note("torch.compile", f"{'on' if compiled else 'off'}, {reason}"),
    )
    train = train.model_copy(
        update=dict(
            device=device.type if ranks > 1 else str(device),
            precision=precision.name,
            compile="on" if compiled else "off",
            num_threads=torch.get_num_threads(),
        )
    )
    return Plan(
        config.model_copy(update=dict(train=train)),
        Runtime(device, precision, compiled),
        duration,
        rows_per_step,
        config.save.background and not waits,
        notes,
    )


def _checked_memory(
    config: RecipeConfig,
    model: ModelConfig,
    T: int,
    trained: int | None,
    quantize: Quantization | None,
    device: torch.device,
    precision: str,
    shards: int,
    *,
    eager: bool,
) -> flops.TrainingMemory:
    """What training needs. ValueError if the device does not have it."""
    train = config.train
    memory = flops.training_memory(
        model, train.batch_size, T, config.optim.kind, trained=trained,
        autocast=None if precision == "fp32" else device.type,
        checkpointing=train.activation_checkpointing, shards=shards,
        chunk_bytes=CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]),
        quantize=quantize, eager=eager,
    )  # fmt: skip
    available = runtime.memory_bytes(device)
    # The formula is accurate to a quarter, and a CPU has swap.
    if available and memory.total > (1.25 if device.type == "cuda" else 1.5) * available:
        several = "--train.shard, " if distributed.world_size() > shards else ""
        raise ValueError(
            f"model and train.batch_size {train.batch_size} need about "
            f"{memory.total / 2**30:,.0f} GiB, {device} has {available / 2**30:,.0f}: use "
            f"{several}a smaller batch_size (total_batch_tokens keeps the step as large), model or "
            "context"
        )
    return memory


def _saving_notes(
    config: RecipeConfig, memory: flops.TrainingMemory, device: torch.device, shards: int
) -> list[Note]:
    """Why checkpoints cannot be written in the background, if they should be and cannot."""
    # trained weights are as large as gradients; rank 0 copies what all ranks have
    needed = copied = (memory.gradients + memory.optimizer) * shards
    if device.type == "cuda":
        needed = copied = 2 * copied  # at most: blocks of pinned memory are powers of two
    else:
        needed += memory.total * distributed.world_size()  # as if all were on this machine
    available = runtime.memory_bytes(torch.device("cpu"))
    if not config.save.background or not available or needed <= 0.8 * available:
        return []
    takes = f"{'up to ' if device.type == 'cuda' else ''}{copied / 2**30:,.1f} GiB"
    text = (
        f"waits for checkpoints: writing them in the background takes {takes} more of the CPU's "
        f"{available / 2**30:,.1f} GiB"
    )
    return [Note("training", text)]


def _mask_notes(model: ModelConfig, dataset: Dataset, device: torch.device) -> list[Note]:
    """That dropout is slow under a mask on a GPU, whose fused kernel for masks has no dropout."""
    if device.type != "cuda" or not model.dropout:
        return []
    if model.mask == "causal()" and dataset.batch(0, 1).documents is None:
        return []
    text = (
        f"with model.dropout {model.dropout:g}, attention takes a dense mask for documents or "
        "windows: GPT-2's steps are a seventh slower than without dropout"
    )
    return [Note("training", text)]


def _idle_notes(micro_batches: int, ranks: int) -> list[Note]:
    if not micro_batches % ranks:
        return []
    busy = micro_batches / ranks / -(-micro_batches // ranks)
    text = (
        f"{micro_batches} micro-batches per step keep {ranks} ranks busy for {busy:.0%} of the "
        f"time: make train.total_batch_tokens a multiple of {ranks} micro-batches"
    )
    return [Note("training", text)]


def _shard_notes(shard: bool, ranks: int) -> list[Note]:
    if not shard:
        return []
    if ranks == 1:
        return [Note("training", "train.shard divides nothing: this process is alone")]
    return [
        Note("training", f"weights, gradients and optimizer state are divided among {ranks} ranks")
    ]


def _length_notes(config: RecipeConfig, steps: int) -> list[Note]:
    """That pretraining of the default length is short, because the text is."""
    train = config.train
    if config.stage != "pretrain" or any((train.steps, train.tokens, train.epochs, train.seconds)):
        return []
    if steps >= _FEW_STEPS:
        return []
    text = (
        f"one pass over this corpus, the default, is {counted(steps, 'step')}, in which a model "
        "learns little: --train.epochs N makes more passes; gptsmith plan says how many, and which "
        "model"
    )
    return [Note("training", text)]


def _repetition_notes(rows_per_step: int, per_epoch: int) -> list[Note]:
    """That a step takes rows more than once, because they are few."""
    if rows_per_step <= per_epoch:
        return []
    text = (
        f"a step of {rows_per_step:,} rows uses the {counted(per_epoch, 'row')} of the data "
        f"{rows_per_step / per_epoch:,.1f} times: a smaller batch gives more steps per epoch"
    )
    return [Note("training", text)]


def _warmup_notes(config: OptimConfig, duration: Duration) -> list[Note]:
    if (steps := warmup_steps(config, duration)) == config.warmup_steps:
        return []
    text = (
        f"warm-up shortened to {counted(steps, 'step')}: with optim.warmup_steps "
        f"{config.warmup_steps:,} the run of {duration.steps:,} would end before its peak "
        "learning rate"
    )
    return [Note("training", text)]

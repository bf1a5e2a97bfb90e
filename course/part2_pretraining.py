"""Part 2: the parts of a pretraining script.

    python -m course.check course/part2_pretraining.py 2.3

`model` is any module that maps ids (B, T) to logits (B, T, V): your GPTModel of part 1, or
gptsmith's. A batch is a pair of inputs and targets, (B, T) int64 each. Where there is nothing to
learn, such as in padding, the target is IGNORE_INDEX.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100

Batch = tuple[Tensor, Tensor]


def create_train_loader(path: Path, batch_size: int, seed: int = 0) -> Iterable[Batch]:
    """2.1. Shuffled batches of an Arrow IPC file; each iteration is a new epoch in a new order.

    Every row of the file's column `input_ids` is a packed list of T + 1 ids: T inputs, and the same
    shifted by one. Rows are independent texts. A last, smaller batch is left out.
    Hint: pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all(), which copies nothing.
    """
    raise NotImplementedError("exercise 2.1")


def create_val_loader(ids: Sequence[int], context_length: int, batch_size: int) -> Iterable[Batch]:
    """2.1. Batches of a text for validation, always the same ones in the order of the text.

    Every token except the first is a target exactly once. So the last window, which may have fewer
    than T tokens, is padded with any id (the targets are IGNORE_INDEX), and the last batch is kept.
    """
    raise NotImplementedError("exercise 2.1")


def validation_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """2.2. The mean loss per target over all batches, in nats.

    In evaluation mode and without gradients; afterwards the model is in the mode it was in.
    """
    raise NotImplementedError("exercise 2.2")


def learning_rate(
    step: int, peak: float, warmup_steps: int, total_steps: int, min_ratio: float = 0.1
) -> float:
    """2.3. The rate of optimizer step `step`, counted from 0: linear warm-up, then half a cosine.

    Warm-up rises in equal steps: step s has peak * (s + 1) / (warmup_steps + 1), so that step
    warmup_steps is the first with the peak. From there the rate falls along half a cosine wave to
    min_ratio * peak, which it would reach at step total_steps, the one after the last.
    """
    raise NotImplementedError("exercise 2.3")


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    accumulation: int,
    peak: float,
    warmup_steps: int,
    max_grad_norm: float = 1.0,
    dtype: torch.dtype = torch.float32,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """2.3. Train for `steps` optimizer steps, each of which takes `accumulation` batches.

    The gradient of a step is that of the mean loss over all its targets, as if its batches were
    one: where they have different numbers of targets, the mean of their means is something else.
    Clip the norm of the whole gradient to max_grad_norm, and set the rate of each step by
    `learning_rate`. In bfloat16, the model runs under torch.autocast; its weights stay float32.
    log: called after each step with step (from 1), loss (mean per target) and learning_rate.
    """
    raise NotImplementedError("exercise 2.3")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """2.4. --batch-size, --learning-rate, --epochs, --width, --layers, --heads, --context-length
    and --weight-decay, each with a default; rate and decay are float, the others int."""
    raise NotImplementedError("exercise 2.4")


def create_model(args: argparse.Namespace, vocab_size: int) -> nn.Module:
    """2.4. A model with the sizes of `parse_arguments`: your GPTModel, or gptsmith's."""
    raise NotImplementedError("exercise 2.4")


def create_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """2.4. AdamW for all parameters that need gradients. Weight decay acts on matrices alone, not
    on norms and other vectors."""
    raise NotImplementedError("exercise 2.4")


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """2.4. Write all that training needs to go on as if it had never stopped."""
    raise NotImplementedError("exercise 2.4")


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """2.4. Restore model and optimizer in place, and return the step."""
    raise NotImplementedError("exercise 2.4")

"""Part 2 by gptsmith's own data sets, evaluation, schedule, training step and optimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptsmith.batch import Batch as TrainingBatch
from gptsmith.data.dataset import validation_batches
from gptsmith.data.examples import Examples
from gptsmith.data.packing import PaddedRows
from gptsmith.evaluate.perplexity import evaluate
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import checkpoint, schedule
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.step import train_steps

Batch = tuple[Tensor, Tensor]
FLAGS = {
    "batch_size": 32, "learning_rate": 1e-3, "epochs": 1, "width": 512, "layers": 12, "heads": 8,
    "context_length": 1024, "weight_decay": 0.1,
}  # fmt: skip


class Epochs:
    """Batches of rows, in another order at each iteration."""

    def __init__(self, rows: PaddedRows, batch_size: int) -> None:
        self.rows, self.B, self.epoch = rows, batch_size, 0

    def __iter__(self) -> Iterator[Batch]:
        n, first = self.rows.per_epoch, self.rows.per_epoch * self.epoch
        self.epoch += 1
        for i in range(n // self.B):
            batch = self.rows.batch(first + i * self.B, self.B)
            yield batch.inputs, batch.targets


def create_train_loader(path: Path, batch_size: int, seed: int = 0) -> Iterable[Batch]:
    examples = Examples(path)
    T = int(examples.lengths.max()) - 1
    return Epochs(PaddedRows(examples, T, seed, pad_id=0, fixed=True), batch_size)


def create_val_loader(ids: Sequence[int], context_length: int, batch_size: int) -> Iterable[Batch]:
    found = validation_batches([np.asarray(ids)], context_length, batch_size, None)
    return [(batch.inputs, batch.targets) for batch in found]


def validation_loss(model: GPTModel, batches: Iterable[Batch]) -> float:
    return evaluate(model, (TrainingBatch(*b) for b in batches), Precision("fp32", "cpu", "")).loss


def learning_rate(
    step: int, peak: float, warmup_steps: int, total_steps: int, min_ratio: float = 0.1
) -> float:
    config = OptimConfig(learning_rate=peak, warmup_steps=warmup_steps, min_lr_ratio=min_ratio)
    return schedule.learning_rate(config, schedule.Duration(total_steps, None), step, 0)


class Stepper:
    """An optimizer of PyTorch, as `train_steps` uses one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers = [optimizer]
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizers[0].param_groups:
            group["lr"] = rate


def train(
    model: GPTModel,
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
    done = train_steps(
        model, next_token_loss,
        lambda step: [TrainingBatch(*batch) for batch in islice(batches, accumulation)],
        Stepper(optimizer),
        learning_rate=lambda step: learning_rate(step, peak, warmup_steps, steps),
        precision=Precision("bf16" if dtype == torch.bfloat16 else "fp32", "cpu", ""),
        max_grad_norm=max_grad_norm, seed=0,
    )  # fmt: skip
    for step in islice(done, steps):
        log({"step": step.step, "loss": step.loss, "learning_rate": step.learning_rate})


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, value in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args(argv)


def create_model(args: argparse.Namespace, vocab_size: int) -> GPTModel:
    sizes = dict(n_layer=args.layers, n_head=args.heads, n_embd=args.width)
    return GPTModel(ModelConfig(**sizes, context_length=args.context_length, vocab_size=vocab_size))


def create_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    config = OptimConfig(
        kind="adamw", learning_rate=args.learning_rate, weight_decay=args.weight_decay
    )
    [adamw] = Optimizer(model, config, "cpu").optimizers
    return adamw


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}|{name}": x for i, fields in moments.items() for name, x in fields.items()}
    checkpoint.save(path, step, {"model": model.state_dict(), "optimizer": tensors}, {})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    found, _ = checkpoint.find(path)
    model.load_state_dict(found.load("model"))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, x in found.load("optimizer").items():
        number, name = key.split("|")
        moments.setdefault(int(number), {})[name] = x
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return found.step

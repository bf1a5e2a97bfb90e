"""Part 4 by gptsmith's own chat data, loss, training step and preparation of a base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from course.reference.part2 import Batch, Stepper
from course.reference.part3 import StoredDataset, create_tuning_loader
from torch import Tensor

from gptsmith.batch import Batch as TrainingBatch
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.chat import load_chat
from gptsmith.data.options import ChatFiles
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import finetune
from gptsmith.recipes.options import ChatConfig
from gptsmith.run import Run
from gptsmith.train.loss import next_token_loss
from gptsmith.train.runtime import Precision
from gptsmith.train.step import train_steps


def create_loaders(
    path: Path,
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    val_fraction: float = 0.05,
    seed: int = 0,
) -> tuple[Iterable[Batch], Iterable[Batch]]:
    template, pad_id = ChatTemplate(TEMPLATE, tokenizer), tokenizer.special_tokens["<|pad|>"]
    examples, _ = load_chat([path], ChatFiles(), template, max_length - 1)
    train, val = map(StoredDataset, examples.split((1 - val_fraction, val_fraction), seed))
    return (
        create_tuning_loader(train, batch_size, pad_id, shuffle=True, seed=seed),
        create_tuning_loader(val, batch_size, pad_id, shuffle=False),
    )


def precision(dtype: torch.dtype) -> Precision:
    return Precision("bf16" if dtype == torch.bfloat16 else "fp32", "cpu", "")


def batch_loss(
    model: GPTModel, inputs: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    batch = TrainingBatch(inputs, targets)
    with precision(dtype).autocast():
        return next_token_loss(model, batch), batch.count


def tuning_step(
    model: GPTModel,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float = 1.0,
) -> float:
    steps = train_steps(
        model, next_token_loss, lambda step: [TrainingBatch(*batch) for batch in batches],
        Stepper(optimizer), learning_rate=lambda step: rate, precision=precision(torch.float32),
        max_grad_norm=max_grad_norm, seed=0,
    )  # fmt: skip
    return next(steps).loss


def load_pretrained(run: Path) -> tuple[GPTModel, Any]:
    config = ChatConfig(**{"from": run, "out": run / "tuned", "data": ("skills",)})
    prepared = finetune.prepare(config, Run.open(run), CHAT_TOKENS)
    return prepared.model.train(), prepared.tokenizer

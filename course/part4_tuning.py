"""Part 4: the parts of a script that tunes a pretrained model on conversations.

    python -m course.check course/part4_tuning.py 4.1

Build on part 3: `from course.part3_chat import ConversationDataset, create_tuning_loader`, or
wherever your solutions are. `model` maps ids (B, T) to logits (B, T, V). A batch is a pair of
inputs and targets, (B, T) int64 each; targets[b, t] follows inputs[b, t], or is IGNORE_INDEX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

Batch = tuple[Tensor, Tensor]


def create_loaders(
    path: Path,
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    val_fraction: float = 0.05,
    seed: int = 0,
) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """4.1. Batches for training and for validation of a file of conversations.

    path: JSON lines, {"messages": [{"role": ..., "content": ...}, ...]} each. A random share of the
    conversations, val_fraction of them but at least one, is for validation, and no conversation is
    in both. The same seed gives the same split. Training has a new order in each epoch, validation
    always the same.
    """
    raise NotImplementedError("exercise 4.1")


def batch_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    """4.2. The sum of the losses of all targets, a tensor () in nats, and the number of targets.

    A sum, because only whoever has all batches of a step knows what to divide by (4.3). In bfloat16
    the model runs under torch.autocast; the loss is float32 all the same.
    """
    raise NotImplementedError("exercise 4.2")


def tuning_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float = 1.0,
) -> float:
    """4.3. One optimizer step over several batches, at the learning rate `rate`. Returns the loss.

    Loss and gradient are those of the mean over all targets of the step: every learned token has
    the same weight, in whichever batch it is. The norm of the whole gradient is clipped to
    max_grad_norm. If no batch has a target, the loss is 0, and so are the gradients.
    """
    raise NotImplementedError("exercise 4.3")


def load_pretrained(run: Path) -> tuple[nn.Module, Any]:
    """4.4. Model and tokenizer of a run of gptsmith, ready to be tuned.

    The tokenizer gets SPECIAL_TOKENS, and the embedding of the model a row for each of them, the
    mean of the old rows: a new token is then neither likely nor unlikely. All else stays as it was
    pretrained; a head that shares its matrix with the embedding still does. The model is in
    training mode, and all its parameters need gradients.
    Hint: gptsmith.load(run) has `model` and `tokenizer`; gptsmith.GPTModel(config) makes a larger
    model, where config is model.config.change(vocab_size=...).
    """
    raise NotImplementedError("exercise 4.4")

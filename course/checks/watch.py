"""What happens inside a model and an optimizer while code of a solution uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

V, T = 13, 8


def small_model(dropout: float = 0.0, vocab_size: int = V, context_length: int = T) -> GPTModel:
    """A model of gptsmith with two layers, 16 wide."""
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=context_length, vocab_size=vocab_size,
        dropout=dropout,
    )  # fmt: skip
    model = GPTModel(config)
    with torch.no_grad():  # predictions that differ clearly, unlike those of an untrained model
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.3)
    return model


class ForwardPasses:
    """Of each forward pass: the mode of the model, whether gradients are recorded, and the dtype in
    which its last matrix product computes."""

    def __init__(self) -> None:
        self.training: list[bool] = []
        self.records_gradients: list[bool] = []
        self.dtypes: list[torch.dtype] = []


@contextmanager
def forward_passes(model: GPTModel) -> Iterator[ForwardPasses]:
    seen = ForwardPasses()

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.training.append(module.training)
        seen.records_gradients.append(torch.is_grad_enabled())
        seen.dtypes.append(output.dtype)

    handle = model.blocks[-1].mlp.down.register_forward_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


class OptimizerSteps:
    """Of each step of an optimizer: the rate and the gradient, one vector."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates: list[float] = []
        self.gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(self._watch)

    def _watch(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        gradients = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        self.gradients.append(torch.cat(gradients).clone())

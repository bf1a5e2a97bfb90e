"""Initial weights: the same whether a module is created alone or inside a model.

C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptsmith.model.config import ModelConfig

_INITIALIZING = ContextVar("_INSIDE", default=False)


@contextmanager
def initialized(module: nn.Module, config: ModelConfig) -> Iterator[None]:
    """Context in which `module` creates its submodules; on exit, their weights are initialized.

    Of nested contexts only the outermost calls `init_weights`, so a model's weights are drawn in
    one pass over all its parameters.
    """
    outermost = not _INITIALIZING.get()
    token = _INITIALIZING.set(True)
    try:
        yield
    finally:
        _INITIALIZING.reset(token)
    if outermost:
        init_weights(module, config)


class deferred_init(TorchFunctionMode):  # noqa: N801 - a context, named like torch.no_grad
    """Context in which a new model gets no weights: `init_parameter` can draw them later, one at a
    time, with the random numbers that follow. For models that are too large to be whole. What
    torch's own layers draw, and a model replaces, is drawn and dropped."""

    def __enter__(self) -> deferred_init:
        self._token = _INITIALIZING.set(True)
        self._dropped = torch.empty(0)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _INITIALIZING.reset(self._token)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func.__name__ not in ("normal_", "uniform_", "kaiming_uniform_"):
            return func(*args, **named)
        p, *rest = args or (named.pop("tensor"),)
        if p.numel() > self._dropped.numel():
            # One for all: memory that was written to and freed would become a parameter's.
            self._dropped = torch.empty(p.numel())
        func(self._dropped[: p.numel()].view(p.shape), *rest, **named)
        return p


def init_weights(module: nn.Module, config: ModelConfig) -> None:
    """Draw all parameters, one after the other."""
    for name, p in module.named_parameters():
        init_parameter(name, p, config)


@torch.no_grad()
def init_parameter(
    name: str, p: Tensor, config: ModelConfig, generator: torch.Generator | None = None
) -> None:
    """Normal(0, 0.02), smaller where C > 768, so that untrained logits are near zero; biases 0.

    Projections back into the residual stream are divided by sqrt(2 * n_layer), which keeps its
    variance independent of depth (GPT-2, section 2.3). generator: default PyTorch's.
    """
    std = 0.02 * min(1.0, math.sqrt(768 / config.n_embd))
    if p.dim() == 1:
        p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    elif name.endswith(("proj.weight", "down.weight")):
        p.normal_(0.0, std / math.sqrt(2 * config.n_layer), generator=generator)
    else:
        p.normal_(0.0, std, generator=generator)

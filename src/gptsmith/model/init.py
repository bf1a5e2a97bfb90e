"""Initial weights: the same whether a module is created alone or inside a model.

C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

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


@torch.no_grad()
def init_weights(module: nn.Module, config: ModelConfig) -> None:
    """Normal(0, 0.02), smaller where C > 768, so that untrained logits are near zero; biases 0.

    Projections back into the residual stream are divided by sqrt(2 * n_layer), which keeps its
    variance independent of depth (GPT-2, section 2.3).
    """
    std = 0.02 * min(1.0, math.sqrt(768 / config.n_embd))
    for name, p in module.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif name.endswith(("proj.weight", "down.weight")):
            p.normal_(0.0, std / math.sqrt(2 * config.n_layer))
        else:
            p.normal_(0.0, std)

"""Random weights of a size that makes every one of them matter."""

import torch
from torch import nn

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel


def randomize(model: nn.Module, seed: int = 1, size: float = 0.25) -> None:
    """New weights of standard deviation `size`: biases that are not zero, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = size * torch.randn(p.shape, generator=generator)
            p.copy_(noise + (p.dim() == 1 and name.endswith("weight")))


def add_noise(model: nn.Module, size: float) -> None:
    """Noise, from the global generator, on all that is trained: adapters too start to matter."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


def model_in_float64(config: ModelConfig) -> GPTModel:
    """A model in eval mode; in float64, rounding never decides and equal means equal."""
    torch.manual_seed(0)
    model = GPTModel(config).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()

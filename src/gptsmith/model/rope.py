"""Rotary position embedding (Su et al. 2021) and its scaling to longer contexts.

B batch, T time, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from gptsmith.model import fused
from gptsmith.model.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair, (D/2,) fp32, with the config's scaling applied."""
    pairs = torch.arange(0, config.D, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (pairs / config.D)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    match scaling.rope_type:
        case "linear":
            return frequencies / scaling.factor
        case "llama3":  # short wavelengths stay, long ones are divided, a ramp lies between
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return keep * frequencies + (1 - keep) * frequencies / scaling.factor
        case unknown:
            assert_never(unknown)


def rotary_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles at positions (T,) or (B, T): fp32 ((B,) T, D/2) each."""
    frequencies = rotary_frequencies(config).to(positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head: x (B, T, H, D), cos and sin (B|1, T, 1, D/2)."""
    if fused.applies(x):
        rotated: Tensor = fused.Rotation.apply(x, cos, sin)
        return rotated
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

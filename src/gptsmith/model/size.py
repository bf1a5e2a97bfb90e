"""What an architecture costs, by closed formulas: parameters, FLOPs, memory.

B batch, T time, C channels, H heads, K key/value heads, D head size, F hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptsmith.model.config import ModelConfig


def parameters(c: ModelConfig) -> int:
    """Trainable numbers, shared ones counted once."""
    everywhere, qkv_bias = c.bias == "all", c.bias != "none"
    norm = c.n_embd * (2 if c.norm == "layernorm" and everywhere else 1)
    qkv = (c.n_head + 2 * c.K) * c.D
    attention = c.n_embd * qkv + qkv * qkv_bias + c.n_head * c.D * c.n_embd + c.n_embd * everywhere
    attention += 2 * c.D * c.qk_norm
    up = c.F * (2 if c.mlp == "swiglu" else 1)
    mlp = c.n_embd * up + up * everywhere + c.F * c.n_embd + c.n_embd * everywhere
    embedding = c.vocab_size * c.n_embd * (1 if c.tied else 2)
    positions = c.context_length * c.n_embd * (c.position == "learned")
    return embedding + positions + c.n_layer * (2 * norm + attention + mlp) + norm


def flops_per_token(c: ModelConfig, T: int | None = None) -> int:
    """Training FLOPs per token: 6 per parameter in a matrix product, and attention's products.

    Attention is counted without causality, 12 * n_layer * H*D * T (Chowdhery et al. 2022, appendix
    B), as the field does when it states MFU. T: sequence length, default the context.
    """
    lookups = c.context_length * c.n_embd * (c.position == "learned")
    lookups += 0 if c.tied else c.vocab_size * c.n_embd
    return 6 * (parameters(c) - lookups) + 12 * c.n_layer * c.n_head * c.D * (T or c.context_length)


def kv_cache_bytes(c: ModelConfig, B: int, S: int, bytes_per_number: int = 4) -> int:
    """Keys and values of S positions of B rows in all layers."""
    return 2 * c.n_layer * B * c.K * S * c.D * bytes_per_number


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds at its peak, between the forward and the backward pass."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(c: ModelConfig, B: int, T: int, optimizer: str = "adamw") -> TrainingMemory:
    """Memory of one fp32 training step on a micro-batch (B, T), without activation recomputing.

    Weights, gradients and the optimizer's moments (two for AdamW; Muon keeps one for the matrices
    of the blocks) are exact. Activations are the tensors that autograd saves per token and layer
    in eager fp32, within about a fifth: a block's two normalised inputs, q, k, v, the attention's
    output, and the MLP's hidden widths. bf16 autocast needs about two thirds of them.
    """
    n = parameters(c)
    matrices = (
        c.n_layer
        * c.n_embd
        * ((c.n_head + 2 * c.K) * c.D + c.n_head * c.D + c.F * (3 if c.mlp == "swiglu" else 2))
    )
    moments = 2 * n - (matrices if optimizer == "muon" else 0)
    qkv = (c.n_head + 2 * c.K) * c.D
    widths = {"gelu": 2, "relu2": 3, "swiglu": 4}[c.mlp] * c.F
    norms = 4 * c.n_embd * (2 if c.norm == "rmsnorm" else 1)
    per_layer = norms + qkv * (3 if c.position == "rope" else 1) + c.n_head * c.D * 2 + widths
    return TrainingMemory(4 * n, 4 * n, 4 * moments, 4 * B * T * (c.n_layer * per_layer + c.n_embd))

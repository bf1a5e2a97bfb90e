"""The whole network: a decoder-only transformer whose variants are options of `ModelConfig`.

Every part works on its own: `MultiHeadAttention(config)(x)` is causal, rotates queries and keys if
the config says rope, and starts with the weights that it would have inside a `GPTModel`.

B batch, T time (S keys, where they differ from the queries), C channels, H query heads,
K key/value heads, D head size, F hidden width of the MLP, V vocabulary.

Sources: GPT-2 (Radford et al. 2019), RoPE (Su et al. 2021), SwiGLU (Shazeer 2020), RMSNorm
(Zhang & Sennrich 2019), ReLU^2 (So et al. 2021), grouped queries (Ainslie et al. 2023),
QK-norm (Henry et al. 2020, as in Qwen3). Layouts follow the classes of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptsmith.model import checks, fused, masks
from gptsmith.model.attention import Bias, any_length, attention, dense_bias
from gptsmith.model.bias import Biases
from gptsmith.model.config import ModelConfig
from gptsmith.model.init import initialized
from gptsmith.model.kv_cache import Cache
from gptsmith.model.masks import Mask
from gptsmith.model.rope import rotary_table, rotate
from gptsmith.model.shared_prefixes import SharedPrefixes


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, without centring and without bias."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if fused.applies(x):
            y: Tensor = fused.RMSNorm.apply(x, self.weight, self.eps)
            return y
        # CUDA's autocast computes this in fp32 and would hand fp32 queries to attention.
        return F.rms_norm(x, (self.size,), self.weight.to(x.dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps:g}"


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm over C that the config names."""
    match config.norm:
        case "rmsnorm":
            return RMSNorm(config.n_embd, config.norm_eps)
        case "layernorm":
            return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.linear_bias)
        case unknown:
            assert_never(unknown)


class TokenEmbedding(nn.Module):
    """Token vectors, plus position vectors where config.position is "learned"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        checks.check_config(config)
        with initialized(self, config):
            self.token = nn.Embedding(config.vocab_size, config.n_embd)
            self.position = (
                nn.Embedding(config.context_length, config.n_embd)
                if config.learned_positions
                else None
            )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Vectors (B, T, C) of ids (B, T). positions: (T,) or (B, T), default 0..T-1."""
        checks.check_ids(ids, self.token.num_embeddings)
        x = self.token(ids)  # (B, T, C)
        if self.position is not None:
            if positions is None:
                checks.check_length(ids.shape[1], self.position.num_embeddings)
                positions = torch.arange(ids.shape[1], device=ids.device)
            x = x + self.position(positions)
        return self.dropout(x)


class FusedLinear(nn.Linear):
    """Several linear layers computed as one: their matrices are stacked by rows. `fused_rows` has
    their numbers of rows, for optimizers that update each matrix separately."""

    def __init__(self, inputs: int, fused_rows: tuple[int, ...], bias: bool) -> None:
        super().__init__(inputs, sum(fused_rows), bias=bias)
        self.fused_rows = fused_rows


class MultiHeadAttention(nn.Module):
    """Self-attention with one fused projection: rows of `qkv` are H query, K key, K value heads.

    layer: the layer of the KV cache that keys and values go to.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        checks.check_config(config)
        self.config, self.layer = config, layer
        self.H, self.K, self.D = config.n_head, config.K, config.D
        rows = (self.H * self.D, self.K * self.D, self.K * self.D)
        with initialized(self, config):
            self.qkv = FusedLinear(config.n_embd, rows, bias=config.qkv_bias)
            self.proj = nn.Linear(self.H * self.D, config.n_embd, bias=config.linear_bias)
            self.q_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else None
            self.k_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else None
        self.rotary, self.dropout = config.rotary, config.dropout

    def forward(
        self,
        x: Tensor,
        mask: Mask | Bias = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T, C) of x (B, T, C).

        mask: default config.mask; a Mask, or what `attention` takes. rotation: cosine and sine
        ((B,) T, 1, D/2) in the dtype of x; default those of positions 0..T-1 where config.position
        is "rope". cache: prepared for these positions (KVCache.prepare, which returns the mask).
        """
        checks.check_vectors(x, self.config.n_embd)
        checks.check_mask(mask)
        B, T, _ = x.shape
        H, K, D = self.H, self.K, self.D
        if mask is None and cache is None and self.config.mask != "causal()":
            mask = masks.parse(self.config.mask)
        if isinstance(mask, Mask):
            mask = dense_bias(mask, B, H, T, x.device)
        qkv = self.qkv(x).view(B, T, H + 2 * K, D)
        q, k, v = qkv.split((H, K, K), dim=2)  # (B, T, H | K, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is None and self.rotary:
            if cache is not None:
                raise ValueError("with a cache, give the rotation of the positions that it holds")
            positions = torch.arange(T, device=x.device)
            cos, sin = rotary_table(self.config, positions)  # (T, D/2)
            rotation = (cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H | K, T, D)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            y = attention(q, k, v, mask, dropout)  # (B, H, T, D)
        else:
            y = cache.attend(self.layer, q, k, v, mask, dropout)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU. Compiled, 1 + tanh(u) is written as 2 * sigmoid(2u): the same function, and
    three times as fast, because the CPU backend has a vector exp and no vector tanh."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_erf": F.gelu,
    "relu2": relu2,
}


class FeedForward(nn.Module):
    """Linear, the activation that config.mlp names, linear: down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        checks.check_config(config)
        if config.mlp not in ACTIVATIONS:
            raise ValueError(
                f"FeedForward has no activation {config.mlp!r}: choose mlp from "
                f"{', '.join(ACTIVATIONS)}, or take SwiGLU for 'swiglu'"
            )
        with initialized(self, config):
            self.up = nn.Linear(config.n_embd, config.F, bias=config.linear_bias)
            self.down = nn.Linear(config.F, config.n_embd, bias=config.linear_bias)
        self.kind = config.mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.kind](self.up(x)))  # up: (B, T, F)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one fused projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        checks.check_config(config)
        bias = config.linear_bias
        with initialized(self, config):
            self.gate_up = FusedLinear(config.n_embd, (config.F, config.F), bias=bias)
            self.down = nn.Linear(config.F, config.n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


def make_mlp(config: ModelConfig) -> nn.Module:
    """The MLP that config.mlp names."""
    match config.mlp:
        case "swiglu":
            return SwiGLU(config)
        case "gelu" | "gelu_erf" | "relu2":
            return FeedForward(config)
        case unknown:
            assert_never(unknown)


class TransformerBlock(nn.Module):
    """Pre-norm residual block: attention, then MLP. layer: see `MultiHeadAttention`."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        checks.check_config(config)
        with initialized(self, config):
            self.attention_norm = make_norm(config)
            self.attention = MultiHeadAttention(config, layer)
            self.mlp_norm = make_norm(config)
            self.mlp = make_mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """(B, T, C) of x (B, T, C). The other arguments are those of `MultiHeadAttention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), *arguments, **named))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPTModel(nn.Module):
    """Token ids in, logits out.

    mask_folder: where a `file.py:function` mask is looked up; the file is imported, which runs its
    code, only with trust_code. mask: the mask that config.mask names, if it is already loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mask_folder: Path | None = None,
        trust_code: bool = False,
        mask: Mask | None = None,
    ) -> None:
        super().__init__()
        checks.check_config(config)
        checks.check_mask(mask)
        self.config = config
        self.mask = mask or masks.parse(config.mask, folder=mask_folder, trust_code=trust_code)
        self.activation_checkpointing = False  # trades a second forward pass for memory
        with initialized(self, config):
            self.embedding = TokenEmbedding(config)
            self.blocks = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layer))
            self.final_norm = make_norm(config)
            headless = config.tie_embeddings or config.labels  # a classifier has its own head
            self.head = (
                None if headless else nn.Linear(config.n_embd, config.vocab_size, bias=False)
            )
        self.rotary = config.rotary
        if self.rotary:
            if torch.get_default_device().type == "meta":  # arithmetic there imports the compiler
                cos = sin = torch.empty(config.context_length, config.D // 2)
            else:
                cos, sin = rotary_table(config, torch.arange(config.context_length))
            self.register_buffer("cos", cos, persistent=False)  # (context, D/2)
            self.register_buffer("sin", sin, persistent=False)
        self._biases = Biases(config)

    cos: Tensor
    sin: Tensor

    @property
    def head_weight(self) -> Tensor:
        """Output matrix (V, C)."""
        return self.embedding.token.weight if self.head is None else self.head.weight

    def forward(self, ids: Tensor, **arguments: Any) -> Tensor:
        """Logits (B, T, V) of ids (B, T) int64. The arguments are those of `hidden`."""
        return F.linear(self.hidden(ids, **arguments), self.head_weight)

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        same_as: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Vectors (B, T, C) after the final norm, from which `head_weight` makes logits.

        mask: a Mask or a boolean or 0/1 tensor (T, T), (B, T, T), (B, H, T, T); default the
        config's. positions: (B, T) or (T,), default 0..T-1, or what follows in the cache, for which
        -1 marks right padding. documents: (B, T) integers; tokens attend to their document only.
        same_as: (B, T) int64, see SharedPrefixes; beside a Mask at most. ValueError for a position
        outside the context, a mask of another shape or with other values, and a cache or same_as
        under a mask that it cannot serve exactly.
        """
        checks.check_ids(ids)
        checks.check_mask(mask)
        B, T = ids.shape
        if same_as is not None:
            checks.check_same_as(same_as, B, T, mask, positions, documents, cache)
            shared = SharedPrefixes(same_as)
            return shared.expand(self.hidden(shared.select(ids), mask=mask, cache=shared))
        limit = self.config.context_length
        if cache is None:
            checks.check_length(T, limit)
        elif documents is not None or isinstance(mask, Tensor):
            raise ValueError("a cache serves Mask objects only, not documents or dense masks")
        elif positions is None:
            positions = cache.next_positions(T)  # (B, T)
        if positions is None:
            positions = torch.arange(T, device=ids.device)  # (T,)
        elif cache is None and not torch.compiler.is_compiling():  # compiled code cannot check
            checks.check_positions(positions, B, T, limit)
        if cache is None:
            dropout = self.training and self.config.dropout > 0
            bias = self._biases(self.mask, mask, documents, B, T, ids.device, dropout)
        else:
            assert not isinstance(mask, Tensor)
            bias = cache.prepare(positions, mask or self.mask, self.config.n_head, limit)
        where = positions.clamp(min=0).to(ids.device) if cache is not None else positions
        x = self.embedding(ids, where)  # (B, T, C)
        rotation = None
        if self.rotary:
            cos, sin = self.cos[where].unsqueeze(-2), self.sin[where].unsqueeze(-2)
            kind = x.device.type
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
            rotation = (cos.to(dtype), sin.to(dtype))  # ((B,) T, 1, D/2)
        with any_length(x.device):
            for block in self.blocks:
                if self.activation_checkpointing and self.training:
                    x = checkpoint(block, x, bias, rotation, cache, use_reentrant=False)
                else:
                    x = block(x, bias, rotation, cache)
        return self.final_norm(x)

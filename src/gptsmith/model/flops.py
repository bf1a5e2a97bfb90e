"""Parameters, FLOPs and memory of an architecture, by closed-form formulas.

B batch, T time, C channels, H heads, K key/value heads, D head size, F hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from gptsmith.model.config import BITS, ModelConfig, Quantization


def parameters(c: ModelConfig) -> int:
    """Number of parameters, shared ones counted once."""
    positions = c.context_length * c.n_embd * c.learned_positions
    embedding = c.vocab_size * c.n_embd + positions
    head = len(c.labels) if c.labels else c.vocab_size * (not c.tie_embeddings)
    norm = c.n_embd * _norm(c)[0]
    return embedding + c.n_layer * _block(c) + norm + head * c.n_embd


def _block(c: ModelConfig) -> int:
    """Number of parameters of a block."""
    everywhere = c.linear_bias
    norm = c.n_embd * _norm(c)[0]
    qkv = (c.n_head + 2 * c.K) * c.D
    attention = (
        c.n_embd * qkv + qkv * c.qkv_bias + c.n_head * c.D * c.n_embd + c.n_embd * everywhere
    )
    attention += 2 * c.D * c.qk_norm
    up = c.F * (1 + c.gated)
    mlp = c.n_embd * up + up * everywhere + c.F * c.n_embd + c.n_embd * everywhere
    return 2 * norm + attention + mlp


def _norm(c: ModelConfig) -> tuple[int, int]:
    """For one norm: how many vectors (C,) of parameters it has, and how many PyTorch's operations
    save per token: RMSNorm's are its input and the scaled one."""
    match c.norm:
        case "layernorm":
            return 1 + c.linear_bias, 1
        case "rmsnorm":
            return 1, 2
        case unknown:
            assert_never(unknown)


def block_matrices(c: ModelConfig) -> int:
    """Parameters of the matrices in all blocks, which Muon trains and every token uses."""
    attention = (c.n_head + 2 * c.K) * c.D + c.n_head * c.D
    return c.n_layer * c.n_embd * (attention + c.F * (2 + c.gated))


def matmul_parameters(c: ModelConfig) -> int:
    """Parameters of the matrices that a token is multiplied by: those of the blocks and the head,
    unless that is a classifier's, which sees only the last token of a text."""
    return block_matrices(c) + c.vocab_size * c.n_embd * (not c.labels)


def weight_bytes(c: ModelConfig, quantize: Quantization | None = None) -> int:
    """Bytes of the weights in training: fp32, or quantized matrices of the blocks."""
    matrices = block_matrices(c)
    return 4 * (parameters(c) - matrices) + int(matrices * (BITS[quantize] if quantize else 32) / 8)


def flops_per_token(c: ModelConfig, T: int | None = None) -> int:
    """Training FLOPs per token, 6N + 12 * n_layer * H*D * T, T by default the context.

    N is `matmul_parameters`, without embedding look-ups. Attention is counted without causality
    (Chowdhery et al. 2022, appendix B), as the field does when it states MFU. Matrix products only:
    norms, softmax and activations are ignored, and so is the second forward pass of activation
    checkpointing.
    """
    return 6 * matmul_parameters(c) + 12 * c.n_layer * c.n_head * c.D * (T or c.context_length)


def kv_cache_bytes(c: ModelConfig, B: int, S: int) -> int:
    """Keys and values of S positions of B rows in all layers, in fp32."""
    return 2 * c.n_layer * B * c.K * S * c.D * 4


@dataclass(frozen=True)
class TrainingMemory:
    """Peak bytes of a training step: between the forward and the backward pass, or in the update.

    activations: what autograd saves. logits: a chunk of them, which the loss computes last. update:
    what Muon needs for a moment, after both. gathered, evaluation: of a sharded model only. Weights
    and gradients that a rank holds whole while it trains: those outside the blocks and of a few
    blocks. All weights, which it holds while it evaluates, when there are no activations.
    accumulates: a step has several micro-batches, whose gradients are added up.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int = 0
    update: int = 0
    gathered: int = 0
    evaluation: int = 0
    accumulates: bool = True

    @property
    def kept(self) -> int:
        """What stays from step to step, gradients included."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        computing = self.activations + self.logits + self.gathered
        if not self.accumulates:  # then gradients are allocated as activations are freed
            computing -= min(self.gradients, self.activations)
        return self.kept + max(computing, self.update, self.evaluation)


def training_memory(
    c: ModelConfig,
    B: int,
    T: int,
    optimizer: str = "adamw",
    *,
    trained: int | None = None,
    autocast: str | None = None,
    checkpointing: bool = False,
    shards: int = 1,
    chunk_bytes: int = 2**27,
    accumulates: bool = True,
    quantize: Quantization | None = None,
    eager: bool = True,
) -> TrainingMemory:
    """Memory of one training step on a micro-batch (B, T), by default in fp32.

    trained: number of parameters that are trained (default: all). autocast: the type of the device
    that computes in bf16 or fp16. checkpointing: a block keeps its input only, and one at a time
    the rest. shards: ranks among which weights, gradients and optimizer are divided; the result is
    the memory of each. chunk_bytes: of the loss's chunks of logits (`CHUNK_BYTES` in train/loss).
    accumulates: see TrainingMemory. quantize: format of the blocks' matrices, which are frozen; the
    one in use, as it is computed, is not counted. eager: on a CPU, whether steps are uncompiled, so
    that norms and attention are those of model/fused.py.

    Weights, gradients and the optimizer's moments (two for AdamW; Muon keeps one for the matrices
    of the blocks) are exact. Activations are what autograd saves in eager fp32 on a CPU under the
    causal mask without dropout, within a tenth. Autocast was measured to save 0.5 to 0.65 of the
    blocks' on a GPU, and on a CPU, where attention keeps probabilities, 0.65 in rows of 256 tokens;
    and its casts of the weights (docs/log.md).
    """
    n = parameters(c)
    gradients = n if trained is None else trained
    moments = 2 * gradients - (block_matrices(c) if optimizer == "muon" and gradients == n else 0)
    heads, kv = c.n_head * c.D, c.K * c.D
    grouped, rope = c.K < c.n_head, c.rotary
    # A norm saves its input, the linear layer after it its own.
    fused = eager and autocast in (None, "cpu")  # RMSNorm by model/fused.py saves nothing else
    norm = c.n_embd * (1 if fused else _norm(c)[1])
    # Attention saves q, k, v and its output: views of the projection, or rotated and repeated.
    attention = heads * (1 + rope + (rope or grouped) + grouped)
    attention += (heads + kv) * (c.qk_norm and not fused)
    if c.qk_norm or not (rope and grouped):
        attention += heads + 2 * kv
    hidden = c.F * (4 if c.gated else 2)
    block = 2 * (norm + c.n_embd) + attention + hidden
    if autocast:
        block = int(block * ({"cpu": 0.65 if eager else 0.87}.get(autocast, 0.63)))
    blocks = block + c.n_layer * c.n_embd if checkpointing else c.n_layer * block
    # The loss keeps the gradient of the head from its forward pass.
    saved = B * T * (blocks + norm + c.n_embd) + c.vocab_size * c.n_embd * (not c.labels)
    saved = 4 * saved + (2 * block_matrices(c) if autocast and not quantize else 0)
    chunks = -(-4 * B * T * c.vocab_size // chunk_bytes)  # of equal size
    logits = int(2.25 * 4 * -(-B * T // chunks) * c.vocab_size) if not c.labels else 0
    # Muon: the update in fp32, and the largest group of equal matrices in its iteration
    update = 16 * block_matrices(c) if optimizer == "muon" and gradients == n else 0
    if shards == 1:
        weights = weight_bytes(c, quantize)
        return TrainingMemory(
            weights, 4 * gradients, 4 * moments, saved, logits, update, accumulates=accumulates
        )
    # Of the blocks, one computes, one is gathered meanwhile, and the buffer that the first was
    # gathered in is freed last; gradients of one are added up while those of the next are computed.
    of_block = _block(c)
    outside = n - c.n_layer * of_block
    gathered = outside + 3 * of_block + min(gradients, outside + 2 * of_block)
    weights, gradients, moments = (-(-size // shards) for size in (n, gradients, moments))
    return TrainingMemory(
        4 * weights, 4 * gradients, 4 * moments, saved, logits, update // shards, 4 * gathered,
        evaluation=4 * n, accumulates=accumulates,
    )  # fmt: skip

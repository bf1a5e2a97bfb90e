"""What to train, from one number: the depth of the model. docs/planning.md explains the rules.

Everything else follows from the depth and the number of training tokens, as in nanochat: the width,
the heads, the learning rate, the batch. torch is not needed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import matmul_parameters

WIDTH_PER_LAYER = 64  # that of GPT-2 (12 x 768) and of the preset fast (6 x 384)
HEAD_SIZE = 64
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, "Training compute-optimal large language models"
# Repeated text is worth nearly as much as new text up to here (Muennighoff et al. 2023, "Scaling
# data-constrained language models").
MAX_EPOCHS = 4
MAX_DEPTH = 64
MIN_BATCH_TOKENS = 2048  # with less, Muon's update takes longer than the gradients
# A micro-batch of a CPU; larger ones need more memory and are not faster.
MAX_CPU_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Design:
    """A model and how it is trained; `tokens` is a multiple of `batch_tokens`.

    batch_size: rows of a micro-batch. sharded: the model is divided among the ranks.
    """

    depth: int
    model: ModelConfig
    tokens: int
    batch_tokens: int
    batch_size: int
    checkpointing: bool = False
    sharded: bool = False

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.batch_tokens // (self.batch_size * self.model.context_length)

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / matmul_parameters(self.model)

    @property
    def learning_rate(self) -> float:
        """Inversely proportional to the width (Yang et al. 2022, "Tensor programs V"), at most
        0.01: 0.005 for the demo's 192, 0.0025 for 384 (docs/log.md)."""
        return round(min(0.01, 0.96 / self.model.n_embd), 5)

    @property
    def eval_tokens(self) -> int:
        """Validation tokens of an evaluation; the last one takes ten times as many."""
        return min(200_000, max(4_096, self.tokens // 200))

    @property
    def eval_interval(self) -> int:
        return max(1, math.ceil(self.steps / 5))

    def recipe(self) -> dict[str, Any]:
        """The fields of PretrainConfig that differ from their defaults, but for data and out."""
        c = self.model
        optim: dict[str, Any] = {"learning_rate": self.learning_rate, "schedule": "linear"}
        optim["warmup_steps"] = max(20, self.steps // 100)
        if self.depth < 6:  # small models, with short runs (docs/log.md)
            optim |= {"momentum": 0.9, "embedding_lr_scale": 2.0}
        train: dict[str, Any] = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "total_batch_tokens": self.batch_tokens,
        }
        if self.checkpointing:
            train["activation_checkpointing"] = True
        if self.sharded:
            train["shard"] = True
        return {
            "model": {
                "preset": "fast",
                "n_layer": c.n_layer,
                "n_head": c.n_head,
                "n_embd": c.n_embd,
                "context_length": c.context_length,
            },
            "train": train,
            "optim": optim,
            "eval": {"interval": self.eval_interval, "tokens": self.eval_tokens},
        }


def shape(depth: int, vocab_size: int) -> ModelConfig:
    """The model of this depth: the preset fast, 64 wide per layer, in heads of 64."""
    width = WIDTH_PER_LAYER * depth
    return ModelConfig.preset(
        "fast",
        n_layer=depth,
        n_head=width // HEAD_SIZE,
        n_embd=width,
        context_length=256 if depth < 8 else 1024,
        vocab_size=vocab_size,
    )


def design(
    depth: int, vocab_size: int, tokens: float, batch_size: int | None = None, ranks: int = 1
) -> Design:
    """Train a model of this depth on about so many tokens.

    batch_size: rows of a micro-batch; by default those of a CPU. With several ranks, the step is a
    multiple of a micro-batch for each.
    """
    model = shape(depth, vocab_size)
    T = model.context_length
    batch = batch_tokens(tokens)
    rows = max(1, min(batch // T // ranks, batch_size or MAX_CPU_MICRO_BATCH_TOKENS // T))
    multiple = rows * T * ranks
    batch = -(-batch // multiple) * multiple
    steps = max(1, round(tokens / batch))
    return Design(depth, model, steps * batch, batch, rows)


def batch_tokens(tokens: float) -> int:
    """Tokens of a step for a run of so many: 0.58 tokens^0.571, as a power of two.

    Li et al. 2025, "Predictable scale: Part I", table 1: half a million for 15 billion tokens, 4096
    for 5 million.
    """
    exact = max(MIN_BATCH_TOKENS, 0.58 * tokens**0.571)
    return int(2 ** round(math.log2(exact)))


def vocabulary(depth: int) -> tuple[int, str]:
    """Ids and tokenizer for a model of this depth, where no corpus decides: the largest whose
    matrix is not larger than the blocks."""
    width = WIDTH_PER_LAYER * depth
    for size, tokenizer in ((50_257, "gpt2"), (4096, "bpe --vocab-size 4096")):
        if size * width <= 12 * depth * width**2:
            return size, tokenizer
    return 257, "byte"

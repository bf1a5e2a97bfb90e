"""Part 1: the components of a GPT, its data set, and its tokenizer.

Replace every `raise NotImplementedError` with your code, in any order that suits you; a good one is
1.1, 1.2, 1.5, 1.6, 1.15 (short), then 1.3 and 1.4 (the hardest), then the rest. After each step:

    python -m course.check course/part1_model.py 1.4

Keep the names of attributes that a docstring gives: the check compares your weights by name.
Letters in shapes: B batch, T time (tokens), C channels (n_embd), H heads, D = C / H size of a head,
F hidden width of the feed-forward layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


class GPTEmbedding(nn.Module):
    """A vector for each token id. Positions have no vectors: attention rotates instead (1.4)."""

    def __init__(self, vocab_size: int, n_embd: int) -> None:
        """1.1. Create `self.token`, the table of V vectors with C numbers each."""
        super().__init__()
        raise NotImplementedError("exercise 1.1")

    def forward(self, ids: Tensor) -> Tensor:
        """1.2. Vectors (B, T, C) of token ids (B, T) int64."""
        raise NotImplementedError("exercise 1.2")


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """1.4, first half: rotary position embedding (RoPE). x (B, H, T, D) -> (B, H, T, D).

    positions: (T,) int64. For i = 0 .. D/2 - 1, channels i and i + D/2 of a head are coordinates
    (a, b) of a point in a plane. Rotated by the angle position * 10000 ** (-2 * i / D), it is
    (a cos - b sin, b cos + a sin).
    Hint: `x.chunk(2, dim=-1)` gives all a and all b; angles (T, D/2) broadcast over B and H.
    """
    raise NotImplementedError("exercise 1.4")


class MultiHeadAttention(nn.Module):
    """Causal self-attention with H heads and rotated queries and keys."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        """1.3. Create `self.query`, `self.key`, `self.value` and `self.out`, linear layers from C
        to C without bias. Rows h * D .. (h + 1) * D - 1 of the first three belong to head h.

        ValueError if n_embd is not a multiple of n_head.
        """
        super().__init__()
        raise NotImplementedError("exercise 1.3")

    def forward(self, x: Tensor) -> Tensor:
        """1.4. (B, T, C) of x (B, T, C).

        1. Project x to queries, keys and values, each (B, T, C).
        2. Divide each into heads, (B, H, T, D). Hint: first view as (B, T, H, D), then transpose.
        3. Rotate queries and keys, not values, with positions 0 .. T - 1.
        4. Scores (B, H, T, T) are products of queries and keys, divided by the square root of D.
        5. A query sees its own position and earlier ones: the other scores become -inf.
        6. Softmax over the keys, then the weighted sum of the values.
        7. Join the heads, (B, T, C), the inverse of step 2, and apply `self.out`.
        """
        raise NotImplementedError("exercise 1.4")


class SwiGLU(nn.Module):
    """A gated activation without weights: main * swish(gate), where swish(x) = x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """1.6. (..., F) of x (..., 2F): the first half of the channels is main, the second gate."""
        raise NotImplementedError("exercise 1.6")


class FeedForward(nn.Module):
    """Two linear layers with SwiGLU between them, applied to each position by itself."""

    def __init__(self, n_embd: int, expansion: int = 4) -> None:
        """1.5. With F = expansion * C, create `self.up`, linear from C to 2F, `self.activation`, a
        SwiGLU, and `self.down`, linear from F to C. No biases."""
        super().__init__()
        raise NotImplementedError("exercise 1.5")

    def forward(self, x: Tensor) -> Tensor:
        """1.6. (B, T, C) of x (B, T, C)."""
        raise NotImplementedError("exercise 1.6")


class TransformerBlock(nn.Module):
    """Attention and feed-forward layers, each added to its input (residual, pre-norm)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0) -> None:
        """1.7. Create `self.attention_norm` and `self.feed_forward_norm`, `nn.RMSNorm` over C with
        eps=1e-5, `self.attention` and `self.feed_forward`; keep `self.dropout`, the probability."""
        super().__init__()
        raise NotImplementedError("exercise 1.7")

    def maybe_dropout(self, x: Tensor) -> Tensor:
        """1.8. x with dropout while the module is in training mode and the probability is not 0."""
        raise NotImplementedError("exercise 1.8")

    def forward(self, x: Tensor) -> Tensor:
        """1.9. (B, T, C) of x (B, T, C). First x + attention(norm(x)), then the same with the
        feed-forward layers; dropout acts on what is added, not on x."""
        raise NotImplementedError("exercise 1.9")


class GPTModel(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        dropout: float = 0.0,
    ) -> None:
        """1.10. Create `self.embedding`, `self.blocks` (an `nn.ModuleList`), `self.final_norm`
        (RMSNorm as in the blocks) and `self.head`, linear from C to V without bias."""
        super().__init__()
        raise NotImplementedError("exercise 1.10")

    def forward(self, ids: Tensor) -> Tensor:
        """1.11. Logits (B, T, V) of ids (B, T): numbers before the softmax, at every position.

        ValueError if T is more than context_length.
        """
        raise NotImplementedError("exercise 1.11")


class GPTDataset(Dataset[tuple[Tensor, Tensor]]):
    """A text as windows of T tokens that do not overlap, each with its targets.

    The target of a token is the next one. So that every token of the text except the first is a
    target exactly once, window i + 1 begins where window i ends. Remaining tokens that do not fill
    a window and its targets are left out.
    """

    def __init__(self, ids: Sequence[int], context_length: int) -> None:
        """1.12. ids: the tokens of the whole text."""
        raise NotImplementedError("exercise 1.12")

    def __len__(self) -> int:
        """1.12. The number of windows."""
        raise NotImplementedError("exercise 1.12")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """1.13. Inputs and targets of window `index`, (T,) int64: targets[t] follows inputs[t].

        IndexError beyond the last window (Python's loops rely on it).
        """
        raise NotImplementedError("exercise 1.13")


def create_dataloader(
    ids: Sequence[int],
    context_length: int,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = True,
    seed: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """1.14. Batches of windows: inputs and targets, (B, T) each.

    shuffle: a new order in each epoch, the same epochs for the same seed. drop_last: leave out a
    last batch with fewer than batch_size windows. Hint: torch.Generator().manual_seed(seed).
    """
    raise NotImplementedError("exercise 1.14")


def setup_tokenizer(folder: str | None = None) -> Any:
    """1.15. GPT-2's tokenizer with SPECIAL_TOKENS added after its 50257 ids.

    Returns an object with `encode(text) -> list[int]`, `decode(ids) -> str` and `special_tokens`,
    a dict from each name to its id. `encode` is for text that people write: "<|end|>" in it is
    plain text, not the special token. folder: GPT-2's vocabulary files, if they are at hand.
    Hint: gptsmith.Tokenizer.gpt2, or transformers' tokenizer in a small class of your own.
    """
    raise NotImplementedError("exercise 1.15")

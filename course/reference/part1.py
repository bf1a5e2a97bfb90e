"""Part 1 by gptsmith's own components, which compute with the weights of the course's layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from gptsmith.chat_template.template import CHAT_TOKENS
from gptsmith.data.dataset import validation_batches
from gptsmith.model import gpt, rope
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

Weights = dict[str, Tensor]


class GPTEmbedding(nn.Module):
    def __init__(self, vocab_size: int, n_embd: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, n_embd)

    def forward(self, ids: Tensor) -> Tensor:
        V, C = self.token.weight.shape
        part = gpt.TokenEmbedding(ModelConfig(n_embd=C, n_head=1, vocab_size=V))
        return functional_call(part, {"token.weight": self.token.weight}, ids)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    config = ModelConfig(n_head=1, n_embd=x.shape[-1])
    return rope.rotate(x, *rope.rotary_table(config, positions))


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.config = ModelConfig(n_embd=n_embd, n_head=n_head)
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(n_embd, n_embd, bias=False))

    def weights(self) -> Weights:
        qkv = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        return {"qkv.weight": qkv, "proj.weight": self.out.weight}

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(gpt.MultiHeadAttention(self.config), self.weights(), x)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        main, gate = x.chunk(2, dim=-1)
        return main * F.silu(gate)


class FeedForward(nn.Module):
    def __init__(self, n_embd: int, expansion: int = 4) -> None:
        super().__init__()
        self.config = ModelConfig(n_embd=n_embd, n_head=1, d_ff=expansion * n_embd)
        self.up = nn.Linear(n_embd, 2 * self.config.F, bias=False)
        self.activation = SwiGLU()
        self.down = nn.Linear(self.config.F, n_embd, bias=False)

    def weights(self) -> Weights:
        main, gate = self.up.weight.chunk(2)
        return {"gate_up.weight": torch.cat([gate, main]), "down.weight": self.down.weight}

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(gpt.SwiGLU(self.config), self.weights(), x)


class TransformerBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = ModelConfig(n_embd=n_embd, n_head=n_head, d_ff=4 * n_embd)
        self.attention_norm = nn.RMSNorm(n_embd, eps=1e-5)
        self.attention = MultiHeadAttention(n_embd, n_head)
        self.feed_forward_norm = nn.RMSNorm(n_embd, eps=1e-5)
        self.feed_forward = FeedForward(n_embd)
        self.dropout = dropout

    def maybe_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def weights(self, prefix: str = "") -> Weights:
        found = {
            "attention_norm.weight": self.attention_norm.weight,
            "mlp_norm.weight": self.feed_forward_norm.weight,
            **{f"attention.{name}": x for name, x in self.attention.weights().items()},
            **{f"mlp.{name}": x for name, x in self.feed_forward.weights().items()},
        }
        return {prefix + name: x for name, x in found.items()}

    def forward(self, x: Tensor) -> Tensor:
        block = gpt.TransformerBlock(self.config)
        block.dropout.p = self.dropout
        return functional_call(block.train(self.training), self.weights(), x)


class GPTModel(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(
            vocab_size=vocab_size, context_length=context_length, n_layer=n_layer, n_head=n_head,
            n_embd=n_embd, d_ff=4 * n_embd, dropout=dropout, tie_embeddings=False,
        )  # fmt: skip
        self.embedding = GPTEmbedding(vocab_size, n_embd)
        blocks = (TransformerBlock(n_embd, n_head, dropout) for _ in range(n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.RMSNorm(n_embd, eps=1e-5)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)

    def weights(self) -> Weights:
        found = {
            "embedding.token.weight": self.embedding.token.weight,
            "final_norm.weight": self.final_norm.weight,
            "head.weight": self.head.weight,
        }
        for i, block in enumerate(self.blocks):
            found |= block.weights(f"blocks.{i}.")
        return found

    def forward(self, ids: Tensor) -> Tensor:
        model = gpt.GPTModel(self.config).train(self.training)
        return functional_call(model, self.weights(), ids)


class GPTDataset(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, ids: Sequence[int], context_length: int) -> None:
        found = validation_batches([np.asarray(ids)], context_length, 1, None)
        self.windows = [batch for batch in found if batch.count == context_length]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.windows[index].inputs[0], self.windows[index].targets[0]


def create_dataloader(
    ids: Sequence[int],
    context_length: int,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = True,
    seed: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    windows, order = GPTDataset(ids, context_length), torch.Generator().manual_seed(seed)
    return DataLoader(windows, batch_size, shuffle, drop_last=drop_last, generator=order)


def setup_tokenizer(folder: str | None = None) -> Tokenizer:
    return Tokenizer.gpt2(folder).add_special_tokens(CHAT_TOKENS)

"""Part 1 as a student might solve it, with PyTorch alone: the checks must accept such code, too."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gptsmith

SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


class GPTEmbedding(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.token = nn.Embedding(vocab_size, n_embd)

    def forward(self, ids):
        return self.token(ids)


def rotate(x, positions):
    D = x.shape[-1]
    frequencies = 10000 ** (-torch.arange(0, D, 2) / D)
    angles = positions[:, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not a multiple of n_head {n_head}")
        self.n_head = n_head
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def heads(self, x):
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

    def forward(self, x):
        B, T, C = x.shape
        q = self.heads(self.query(x))
        k = self.heads(self.key(x))
        v = self.heads(self.value(x))
        at = torch.arange(T)
        q = rotate(q, at)
        k = rotate(k, at)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_head)
        later = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(later, -math.inf)
        weights = scores.softmax(dim=-1)
        y = weights @ v
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def forward(self, x):
        main, gate = x.chunk(2, dim=-1)
        return main * (gate * torch.sigmoid(gate))


class FeedForward(nn.Module):
    def __init__(self, n_embd, expansion=4):
        super().__init__()
        hidden = expansion * n_embd
        self.up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.activation = SwiGLU()
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class TransformerBlock(nn.Module):
    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.attention_norm = nn.RMSNorm(n_embd, eps=1e-5)
        self.attention = MultiHeadAttention(n_embd, n_head)
        self.feed_forward_norm = nn.RMSNorm(n_embd, eps=1e-5)
        self.feed_forward = FeedForward(n_embd)
        self.dropout = dropout

    def maybe_dropout(self, x):
        return F.dropout(x, p=self.dropout, training=self.training)

    def forward(self, x):
        x = x + self.maybe_dropout(self.attention(self.attention_norm(x)))
        x = x + self.maybe_dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class GPTModel(nn.Module):
    def __init__(self, vocab_size, context_length, n_layer, n_head, n_embd, dropout=0.0):
        super().__init__()
        self.context_length = context_length
        self.embedding = GPTEmbedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(
            [TransformerBlock(n_embd, n_head, dropout) for _ in range(n_layer)]
        )
        self.final_norm = nn.RMSNorm(n_embd, eps=1e-5)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, ids):
        if ids.shape[1] > self.context_length:
            raise ValueError(f"{ids.shape[1]} tokens are more than {self.context_length}")
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


class GPTDataset(Dataset):
    def __init__(self, ids, context_length):
        self.ids = torch.tensor(ids, dtype=torch.long)
        self.T = context_length

    def __len__(self):
        return (len(self.ids) - 1) // self.T

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        start = index * self.T
        return self.ids[start : start + self.T], self.ids[start + 1 : start + self.T + 1]


def create_dataloader(ids, context_length, batch_size, shuffle=True, drop_last=True, seed=0):
    return DataLoader(
        GPTDataset(ids, context_length),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )


class PlainText:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special_tokens = tokenizer.special_tokens

    def encode(self, text):
        return self.tokenizer.encode(text, allow_special=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def setup_tokenizer(folder=None):
    base = gptsmith.Tokenizer.gpt2(folder)
    return PlainText(base.add_special_tokens(SPECIAL_TOKENS))

"""Conversations, and models whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from course.checks.compare import Mismatch

from gptsmith.chat_template.template import CHAT_TOKENS
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
SPECIAL = TOKENIZER.special_tokens
END = SPECIAL["<|end|>"]
PAD = SPECIAL["<|pad|>"]
USER, ASSISTANT = SPECIAL["<|user|>"], SPECIAL["<|assistant|>"]
MOST_CALLS = 300

Message = dict[str, str]


def conversation(*contents: str, system: str = "") -> list[Message]:
    """Contents of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


ONE_TURN = conversation("Hello", "Hi!")
TWO_TURNS = conversation("Hi", "Yes?", "What is <|end|>?", "A token.\n", system="Be brief.")
CHATS = [conversation(f"Question {n}", "yes " * (n + 1)) for n in range(7)]


def bounded(model: GPTModel) -> GPTModel:
    """The model, which refuses to be called for ever."""
    calls = 0

    def count(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > MOST_CALLS:
            raise Mismatch(f"the model was called {MOST_CALLS} times: the answer does not end")

    model.register_forward_pre_hook(count)
    return model


@torch.no_grad()
def chain_model(follows: Mapping[int, int], context_length: int) -> GPTModel:
    """The last token alone decides the next one, which is follows[token], or itself."""
    V = TOKENIZER.vocab_size
    C = -(-V // 4) * 4
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=C, d_ff=8, vocab_size=V, context_length=context_length,
        tie_embeddings=False,
    )  # fmt: skip
    model = GPTModel(config)
    block = model.blocks[0]
    block.attention.proj.weight.zero_()
    block.mlp.down.weight.zero_()
    model.embedding.token.weight.copy_(torch.eye(V, C))
    model.head.weight.zero_()
    for token in range(V):
        model.head.weight[follows.get(token, token), token] = 1
    return bounded(model)


@torch.no_grad()
def random_model(seed: int, context_length: int) -> GPTModel:
    """Answers depend on the whole prompt; of the special tokens, only <|end|> is written."""
    torch.manual_seed(seed)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, vocab_size=TOKENIZER.vocab_size, tie_embeddings=False,
        context_length=context_length,
    )  # fmt: skip
    model = GPTModel(config)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, 0.3)
    for id in SPECIAL.values():
        if id != END:
            model.head.weight[id] = 0
    return bounded(model.eval())

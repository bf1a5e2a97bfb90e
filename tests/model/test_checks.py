"""Wrong arguments of the network are rejected in one line that says what to give instead."""

import re

import numpy as np
import pytest
import torch
from small_configs import LLAMA

from gptsmith.model import masks
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import (
    FeedForward,
    GPTModel,
    MultiHeadAttention,
    SwiGLU,
    TokenEmbedding,
    TransformerBlock,
)
from gptsmith.model.kv_cache import KVCache
from gptsmith.model.lora import train_token_rows

GOOD = torch.tensor([[1, 2, 3]])


def rejected(message: str, call, *args: object, **named: object) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(*args, **named)
    assert "\n" not in str(caught.value)


WRONG_IDS = [
    (torch.tensor([1, 2]), "ids are torch.int64 of shape (2,): give (B, T), ids[None] is a batch"),
    (torch.tensor(1), "ids are torch.int64 of shape (): give (B, T), a row for each text"),
    (torch.zeros(1, 2, 3).long(), "of shape (1, 2, 3): give (B, T)"),
    (torch.zeros(1, 3), "ids are torch.float32 of shape (1, 3): give token ids (B, T) as int64"),
    (torch.ones(1, 3).bool(), "ids are torch.bool"),
    (GOOD.to(torch.uint8), "ids are torch.uint8"),
    ([[1, 2]], "ids are list [[1, 2]]: give a tensor (B, T)"),
    (np.array([[1, 2]]), "ids are ndarray array([[1, 2]]): give a tensor"),
    ("abc", "ids are str 'abc': give a tensor"),
    (torch.tensor([[1, 20]]), "id 20 is outside the vocabulary 0..19: encode the text with"),
    (torch.tensor([[-1, 3]]), "id -1 is outside the vocabulary 0..19"),
    (torch.ones(1, 9).long(), "sequence of 9 tokens is longer than context_length 8"),
]


@pytest.mark.parametrize(("ids", "message"), WRONG_IDS)
def test_wrong_ids(config: ModelConfig, ids: object, message: str) -> None:
    rejected(message, GPTModel(config), ids)
    if "context_length" not in message or config.position == "learned":
        rejected(message, TokenEmbedding(config), ids)


def test_wrong_ids_of_a_classifier() -> None:
    classifier = GPTClassifier(LLAMA.change(labels=("a", "b")))
    for ids, message in WRONG_IDS:
        rejected(message, classifier.logits, ids, torch.tensor([1]))
    rejected("lengths of shape (2,) for 1 texts", classifier.logits, GOOD, torch.tensor([1, 1]))


def test_wrong_ids_with_trained_rows_and_with_a_cache(config: ModelConfig) -> None:
    model = GPTModel(config).requires_grad_(False)
    train_token_rows(model, [3])
    rejected("id 20 is outside the vocabulary 0..19", model, torch.tensor([[20]]))
    cache = KVCache.for_model(config, model.mask, 1)
    rejected("position 8 is outside context_length 8", model, torch.ones(1, 9).long(), cache=cache)
    rejected("ids[None] is a batch", model, torch.tensor([1]), cache=cache)


def test_int32_ids_and_empty_batches_are_accepted(config: ModelConfig) -> None:
    model = GPTModel(config).eval()
    torch.testing.assert_close(model(GOOD.int()), model(GOOD))
    assert model(torch.zeros(0, 3).long()).shape == (0, 3, 20)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("causal()", "mask is str 'causal()': give masks.parse('causal()')"),
        (masks.causal, "give masks.Mask(it)"),
        (lambda b, h, q, k: q >= k, "give masks.Mask(it)"),
        (True, "mask is bool True: give a Mask or a tensor (T, T) of booleans"),
        (np.ones((3, 3)), "mask is ndarray array"),
    ],
)
def test_wrong_masks(mask: object, message: str) -> None:
    rejected(message, GPTModel, LLAMA, mask=mask)
    rejected(message, GPTModel(LLAMA), GOOD, mask=mask)
    rejected(message, MultiHeadAttention(LLAMA), torch.zeros(1, 3, 32), mask)
    rejected(message, TransformerBlock(LLAMA), torch.zeros(1, 3, 32), mask)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 32), "x is torch.float32 of shape (3, 32): give vectors (B, T, 32)"),
        (torch.zeros(1, 3, 8), "of shape (1, 3, 8): give vectors (B, T, 32)"),
        (GOOD, "give vectors (B, T, 32), which TokenEmbedding(config) makes of ids"),
        ([0.5], "x is list [0.5]: give a tensor (B, T, 32)"),
    ],
)
def test_wrong_vectors(x: object, message: str) -> None:
    rejected(message, MultiHeadAttention(LLAMA), x)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"positions": torch.arange(4)}, "positions are torch.int64 of shape (4,) for 1 rows of 3"),
        ({"positions": torch.zeros(3)}, "positions are torch.float32"),
        ({"positions": torch.tensor([0, 1, 8])}, "position 8 is outside context_length 8"),
        ({"documents": torch.arange(3)}, "documents are torch.int64 of shape (3,) for 1 rows of 3"),
        ({"documents": torch.zeros(1, 2).long()}, "documents are torch.int64 of shape (1, 2)"),
        ({"documents": torch.zeros(1, 3)}, "documents are torch.float32 of shape (1, 3)"),
    ],
)
def test_wrong_positions_and_documents(named: dict, message: str) -> None:
    rejected(message, GPTModel(LLAMA), GOOD, **named)


def test_attention_with_a_cache_needs_the_rotation_of_its_positions() -> None:
    """The default, positions 0..T-1, would be wrong for all tokens but those of the first pass."""
    cache = KVCache.for_model(LLAMA, masks.causal(), 1)
    cache.prepare(torch.arange(3), masks.causal(), 4, 8)
    message = "with a cache, give the rotation of the positions that it holds"
    rejected(message, MultiHeadAttention(LLAMA), torch.zeros(1, 3, 32), cache=cache)


@torch.no_grad()
def test_a_compiled_model_accepts_what_the_plain_one_does(config: ModelConfig) -> None:
    model = GPTModel(config).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    positions = torch.tensor([[0, 1, 0]])
    documents = torch.tensor([[0, 0, 1]])
    torch.testing.assert_close(compiled(GOOD), model(GOOD))
    torch.testing.assert_close(
        compiled(GOOD, positions=positions, documents=documents),
        model(GOOD, positions=positions, documents=documents),
    )
    falls_back = torch.compile(model, backend="eager")
    rejected("longer than context_length 8", falls_back, torch.ones(1, 9).long())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tiny", "config is str 'tiny': give ModelConfig.preset('tiny')"),
        ({"n_layer": 1}, "config is dict {'n_layer': 1}: give ModelConfig(...)"),
        (None, "config is NoneType None: give ModelConfig(...)"),
    ],
)
def test_wrong_configurations(wrong: object, message: str) -> None:
    parts = (GPTModel, TokenEmbedding, MultiHeadAttention, FeedForward, SwiGLU, TransformerBlock)
    for part in parts:
        rejected(message, part, wrong)

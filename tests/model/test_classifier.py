from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_weights import add_noise

from gptsmith.batch import Batch
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import next_token_loss

LABELS = ("ham", "spam", "other")
SMALL = dict(n_layer=2, n_head=2, n_embd=16, context_length=16, vocab_size=97)


def texts(B: int, T: int, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows of different lengths up to T, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 97, (B, T), generator=generator)
    lengths = torch.cat([torch.randint(1, T, (B - 1,), generator=generator), torch.tensor([T])])
    return ids.where(torch.arange(T) < lengths[:, None], torch.tensor(pad)), lengths


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
def test_logits_equal_those_of_transformers(case: str, stock: Callable[..., Any]) -> None:
    pair = stock(case, LABELS)
    ids, lengths = texts(4, 12)
    expected = pair.theirs(ids, attention_mask=(ids != 0).long()).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(pair.ours.logits(ids, lengths), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("mask", ["causal()", "prefix(4)", "bidirectional()"])
def test_a_batched_row_equals_the_row_alone_under_any_mask(mask: str, position: str) -> None:
    torch.manual_seed(0)
    model = GPTClassifier(ModelConfig(**SMALL, mask=mask, position=position, labels=LABELS)).eval()
    add_noise(model, 0.3)
    ids, lengths = texts(5, 12)
    batched = model.logits(ids, lengths)  # (B, 3)
    assert torch.equal(batched, model.logits(texts(5, 12, pad=50)[0], lengths))
    for row, length, logits in zip(ids, lengths, batched, strict=True):
        alone = model.logits(row[None, :length], length[None])[0]
        torch.testing.assert_close(alone, logits, rtol=1e-5, atol=1e-5)
    # What stands before the last token matters, so the whole text was read.
    changed = ids.clone()
    changed[-1, 0] = 1 + changed[-1, 0] % 96
    assert not torch.allclose(model.logits(changed, lengths)[-1], batched[-1])


@pytest.mark.parametrize("length", [0, 13])
def test_invalid_length_is_rejected(length: int) -> None:
    model = GPTClassifier(ModelConfig(**SMALL, labels=LABELS))
    with pytest.raises(ValueError, match=rf"lengths \[12, {length}\] of rows of 12 tokens"):
        model.logits(texts(2, 12)[0], torch.tensor([12, length]))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_classifier_is_a_gpt_with_another_head(tie_embeddings: bool) -> None:
    plain = GPTModel(ModelConfig(**SMALL, tie_embeddings=tie_embeddings))
    model = GPTClassifier(ModelConfig(**SMALL, tie_embeddings=tie_embeddings, labels=LABELS))
    body = [name for name in plain.state_dict() if name != "head.weight"]
    assert list(model.state_dict()) == [*body, "score.weight"]
    assert model.score.weight.shape == (3, 16)
    assert 0.01 < model.score.weight.std() < 0.03
    # It cannot be taken for a language model.
    ids, _ = texts(2, 12)
    with pytest.raises(ValueError, match=r"classifier \(ham, spam, other\)"):
        model(ids)
    with pytest.raises(ValueError, match="classifier"):
        next_token_loss(model, Batch(ids[:, :-1], ids[:, 1:]))


def test_classifier_needs_class_names() -> None:
    with pytest.raises(ValueError, match=r"set model\.labels"):
        GPTClassifier(ModelConfig(**SMALL))

"""Models made from tensors and from other models. Damaged files: tests/run/test_run.py."""

import subprocess
import sys

import pytest
import torch

from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.masks import causal
from gptsmith.model.state_dict import (
    load,
    resize_token_embeddings,
    with_classification_head,
    with_dropout,
)

SMALL = dict(n_layer=2, n_head=2, n_embd=16, context_length=16, vocab_size=40)
LABELS = ("no", "yes")
IDS = torch.arange(12).view(2, 6)


def test_labels_select_a_classifier() -> None:
    for labels in ((), LABELS):
        config = ModelConfig(**SMALL, labels=labels)
        model = (GPTClassifier if labels else GPTModel)(config)
        again = load(config, model.state_dict(), "there")
        assert type(again) is type(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(ValueError, match=r"there does not fit .*: score\.weight is missing"):
        load(config, GPTModel(ModelConfig(**SMALL)).state_dict(), "there")


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_classifier_takes_over_the_body_of_a_language_model(tie_embeddings: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(ModelConfig(**SMALL, tie_embeddings=tie_embeddings)).eval()
    model.mask = causal()  # as loaded from somewhere
    new = with_classification_head(model, LABELS)
    assert new.config == model.config.change(labels=LABELS)
    assert new.mask is model.mask
    assert not new.training
    assert 0.01 < new.score.weight.std() < 0.03
    assert torch.equal(new.hidden(IDS), model.hidden(IDS))
    assert all(p.requires_grad for p in new.parameters())
    # From one classification to the next: the old head goes.
    other = with_classification_head(new, ["a", "b", "c"])
    assert other.score.weight.shape == (3, 16)
    assert torch.equal(other.hidden(IDS), model.hidden(IDS))
    assert sum(p.numel() for p in other.parameters()) == sum(
        p.numel() for p in GPTClassifier(other.config).parameters()
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_new_tokens_start_as_the_mean_of_the_old(tie_embeddings: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(ModelConfig(**SMALL, tie_embeddings=tie_embeddings)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(IDS)
    assert resize_token_embeddings(model, 45) is model
    assert model.config == ModelConfig(**{**SMALL, "vocab_size": 45}, tie_embeddings=tie_embeddings)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in GPTModel(model.config).state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        if name in ("embedding.token.weight", "head.weight"):
            assert torch.equal(tensor[:40], before[name])
            for row in tensor[40:]:
                torch.testing.assert_close(row, before[name].mean(dim=0))
        else:
            assert torch.equal(tensor, before[name])
    assert all(p.requires_grad for p in model.parameters())
    # The old ids keep their logits, and lose at most 5 / 40 of their probability to the new.
    after = model(IDS)
    torch.testing.assert_close(after[..., :40], logits)
    left = after.softmax(dim=-1)[..., :40].sum(dim=-1)
    assert (left >= 40 / 45).all()
    assert (model(torch.tensor([[44, 43]])) == model(torch.tensor([[40, 41]]))).all()


@pytest.mark.parametrize("labels", [(), LABELS])
def test_with_dropout_shares_the_weights(labels: tuple[str, ...]) -> None:
    config = ModelConfig(**SMALL, labels=labels, tie_embeddings=not labels)
    model = (GPTClassifier if labels else GPTModel)(config)
    new = with_dropout(model, 0.5)
    assert type(new) is type(model)
    assert new.config == config.change(dropout=0.5)
    assert not torch.equal(new.hidden(IDS), new.hidden(IDS))
    assert torch.equal(new.eval().hidden(IDS), model.hidden(IDS))
    assert torch.equal(with_dropout(new.train(), 0).hidden(IDS), model.hidden(IDS))
    assert len(list(new.parameters())) == len(list(model.parameters()))


def test_unused_padding_rows_become_the_mean() -> None:
    model = GPTModel(ModelConfig(**SMALL))
    mean = model.embedding.token.weight[:30].mean(dim=0).detach()
    for size in (40, 41):
        resize_token_embeddings(model, size, used=30)
        for row in model.embedding.token.weight[30:]:
            torch.testing.assert_close(row.detach(), mean)


@pytest.mark.parametrize(("size", "used"), [(39, None), (40, 41), (40, 0)])
def test_a_vocabulary_does_not_shrink(size: int, used: int | None) -> None:
    with pytest.raises(ValueError, match="cannot shrink"):
        resize_token_embeddings(GPTModel(ModelConfig(**SMALL)), size, used)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_layer=900), dict(vocab_size=10**9), dict(d_ff=10**9), dict(d_ff=10**15),
        dict(n_embd=10**7, head_dim=4), dict(n_head=2 * 10**8, n_kv_head=2, head_dim=4),
    ],
)  # fmt: skip
def test_sizes_beyond_the_weights_are_rejected_before_anything_is_allocated(
    sizes: dict[str, int],
) -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=8, vocab_size=16)
    tensors = GPTModel(config).state_dict()
    with pytest.raises(ValueError, match=r"^[^\n]*(does not fit|impossible sizes)"):
        load(config.change(**sizes), tensors, "there")


def test_more_layers_and_longer_rotary_tables_than_anybody_has_are_rejected() -> None:
    with pytest.raises(ValueError, match="n_layer"):
        ModelConfig(n_layer=10**6)
    with pytest.raises(ValueError, match="too long for the rotary tables of head_dim 64: at most"):
        ModelConfig(context_length=10**9, position="rope")
    assert ModelConfig(context_length=1 << 20, position="rope").rotary


def test_loading_does_not_wait_for_the_import_of_torchs_compiler() -> None:
    """Arithmetic on the meta device imports it: more than a second at the start of each command."""
    code = """
import sys
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.state_dict import load
config = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=40)
assert config.rotary
load(config, GPTModel(config).state_dict(), "there")
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

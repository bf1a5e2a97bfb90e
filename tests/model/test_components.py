"""Each part of the network by itself, as a student or a notebook uses it."""

import copy

import pytest
import torch
from small_configs import GPT2, LLAMA
from torch import Tensor, nn

from gptsmith.model import masks
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.model.gpt import (
    FeedForward,
    GPTModel,
    MultiHeadAttention,
    SwiGLU,
    TokenEmbedding,
    TransformerBlock,
)


def x(B: int = 2, T: int = 8) -> Tensor:
    return torch.randn(B, T, 32, generator=torch.Generator().manual_seed(1))


def test_parts_composed_by_hand_are_the_model(config: ModelConfig) -> None:
    """Defaults of mask, rotation and positions are those that the model passes."""
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    ids = torch.randint(20, (2, 8))
    h = model.embedding(ids)
    for block in model.blocks:
        h = h + block.attention(block.attention_norm(h))
        h = h + block.mlp(block.mlp_norm(h))
    logits = model.final_norm(h) @ model.head_weight.T
    torch.testing.assert_close(logits, model(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [MultiHeadAttention, TransformerBlock])
def test_attention_alone_is_causal(config: ModelConfig, part: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, a = part(config).eval(), x()
    b = a.clone()
    b[:, 5:] += 1.0
    torch.testing.assert_close(module(a)[:, :5], module(b)[:, :5], rtol=0, atol=0)
    assert not torch.allclose(module(a)[:, 5:], module(b)[:, 5:])


def test_attention_alone_knows_positions_where_the_config_says_rope() -> None:
    """With rotation, the order of earlier tokens matters; without, a query sees a bag of keys."""
    torch.manual_seed(0)
    a = x()
    swapped = a[:, [1, 0, *range(2, 8)]]
    rope, learned = MultiHeadAttention(LLAMA).eval(), MultiHeadAttention(GPT2).eval()
    assert not torch.allclose(rope(a)[:, -1], rope(swapped)[:, -1], atol=1e-6)
    torch.testing.assert_close(learned(a)[:, -1], learned(swapped)[:, -1], rtol=1e-5, atol=1e-6)


def test_copies_of_a_part_know_positions() -> None:
    """A part taken out of a model, copied, or filled with a model's weights computes the same."""
    model, a = GPTModel(LLAMA).eval(), x()
    within = model.blocks[0].attention
    filled = MultiHeadAttention(LLAMA).eval()
    filled.load_state_dict(within.state_dict())
    for part in (copy.deepcopy(within), filled, copy.deepcopy(model).blocks[0].attention):
        torch.testing.assert_close(part(a), within(a), rtol=0, atol=0)
    assert within.double()(a.double()).dtype == torch.float64


def test_attention_alone_honours_the_mask_of_the_config_or_the_one_given() -> None:
    torch.manual_seed(0)
    window = masks.causal() & masks.sliding_window(2)
    attention = MultiHeadAttention(LLAMA).eval()
    windowed = MultiHeadAttention(LLAMA.change(mask=window.expression)).eval()
    windowed.load_state_dict(attention.state_dict())
    at = torch.arange(8)
    expected = attention(x(), window.dense(2, 4, at, at))
    torch.testing.assert_close(attention(x(), window), expected)
    torch.testing.assert_close(windowed(x()), expected)
    assert not torch.allclose(attention(x()), expected)


def test_parts_alone_start_with_the_weights_that_they_have_in_a_model(config: ModelConfig) -> None:
    """Equal spread for every matrix, ones and zeros where the model has them."""
    torch.manual_seed(0)
    big = config.change(n_embd=256, n_head=8, n_kv_head=4 if config is LLAMA else 8)
    model = GPTModel(big)
    parts = {
        "embedding.": TokenEmbedding(big),
        "blocks.0.": TransformerBlock(big),
        "blocks.1.attention.": MultiHeadAttention(big),
        "blocks.1.mlp.": SwiGLU(big) if big.mlp == "swiglu" else FeedForward(big),
    }
    for prefix, part in parts.items():
        for name, p in part.named_parameters():
            inside = model.get_parameter(prefix + name)
            assert p.shape == inside.shape
            if p.dim() == 1:
                torch.testing.assert_close(p, inside)
            else:
                spread = float(inside.detach().std())
                assert float(p.detach().std()) == pytest.approx(spread, rel=0.05), name


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_from_the_axes_that_it_names(name: str) -> None:
    config = ModelConfig.preset(name).change(n_layer=1, vocab_size=20, context_length=8)
    with torch.device("meta"):
        block = TransformerBlock(config)
    assert isinstance(block.mlp, SwiGLU) == (config.mlp == "swiglu")
    assert isinstance(block.attention_norm, nn.LayerNorm) == (config.norm == "layernorm")


@pytest.mark.parametrize("axis", ["norm", "mlp", "position", "bias"])
def test_an_unknown_value_of_an_axis_never_builds(config: ModelConfig, axis: str) -> None:
    """Even where validation was bypassed, no part falls back to another kind."""
    broken = config.model_copy(update={axis: "of the future"})
    parts: dict[str, list[type[nn.Module]]] = {
        "norm": [TransformerBlock],
        "mlp": [TransformerBlock],
        "position": [TokenEmbedding, MultiHeadAttention, TransformerBlock],
        "bias": [MultiHeadAttention, SwiGLU, TransformerBlock],
    }
    for part in (GPTModel, *parts[axis]):
        with pytest.raises(AssertionError, match="of the future"):
            part(broken)


def test_feed_forward_names_the_class_for_swiglu() -> None:
    with pytest.raises(ValueError, match=r"no activation 'swiglu'.*take SwiGLU"):
        FeedForward(LLAMA)

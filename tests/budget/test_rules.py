"""What follows from the depth of a model."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.budget import rules
from gptsmith.config import load_config
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import parameters
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run import layout


def test_depths_have_the_shapes_of_known_models() -> None:
    assert rules.shape(6, 50257) == ModelConfig.preset("fast")
    gpt2 = ModelConfig.preset("gpt2")
    c = rules.shape(12, 50257)
    assert (c.n_embd, c.n_head, c.context_length) == (gpt2.n_embd, gpt2.n_head, gpt2.context_length)


@given(
    depth=st.integers(1, rules.MAX_DEPTH),
    tokens=st.floats(1, 1e13),
    rows=st.sampled_from([None, 1, 8, 64]),
    ranks=st.integers(1, 1024),
)
def test_a_step_has_whole_micro_batches_for_every_rank(depth, tokens, rows, ranks) -> None:
    d = rules.design(depth, 1000, tokens, rows, ranks)
    assert d.micro_batches * d.batch_size * d.model.context_length == d.batch_tokens
    assert d.micro_batches % ranks == 0
    assert d.tokens == d.steps * d.batch_tokens
    assert d.steps >= 1
    assert abs(d.tokens - tokens) <= max(d.batch_tokens / 2, d.batch_tokens - tokens)


def test_batches_grow_with_the_tokens() -> None:
    """The published rule: 0.58 tokens^0.571."""
    assert rules.batch_tokens(1e5) == rules.MIN_BATCH_TOKENS
    assert rules.batch_tokens(5e6) == 4096
    assert rules.batch_tokens(15e9) == 2**19


def test_learning_rates_fall_with_the_width() -> None:
    rates = [rules.design(depth, 257, 1e6).learning_rate for depth in range(1, 25)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[2], rates[5]) == (0.01, 0.005, 0.0025)


@pytest.mark.parametrize("depth", [1, 3, 6, 12])
def test_pretrain_reads_the_recipe_as_the_design(tmp_path: Path, depth: int) -> None:
    d = rules.design(depth, 50257, 3e8, 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(layout.yaml_text({"data": "data/x", "out": "runs/x", **d.recipe()}))
    config = load_config(PretrainConfig, [str(recipe)], prog="gptsmith pretrain")
    assert config.model.change(vocab_size=50257) == d.model
    assert config.train.steps == d.steps
    assert (config.train.batch_size, config.train.total_batch_tokens) == (8, d.batch_tokens)
    assert config.optim.learning_rate == d.learning_rate
    assert not config.train.activation_checkpointing


def test_the_matrix_of_a_vocabulary_is_no_larger_than_the_blocks() -> None:
    for depth in range(1, 25):
        size, _ = rules.vocabulary(depth)
        c = rules.shape(depth, size)
        assert size == 257 or 2 * size * c.n_embd <= 1.1 * parameters(c)
    assert [rules.vocabulary(depth)[1] for depth in (2, 4, 12)] == [
        "byte", "bpe --vocab-size 4096", "gpt2",
    ]  # fmt: skip

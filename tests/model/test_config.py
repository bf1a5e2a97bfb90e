import pytest
from pydantic import ValidationError

from gptsmith.model.config import PRESETS, ModelConfig, RopeScaling


def test_omitted_sizes_are_derived() -> None:
    c = ModelConfig(n_head=4, n_embd=96)
    assert (c.K, c.D, c.F) == (4, 24, 256)  # 8/3 * 96 = 256, a multiple of 64 already
    assert ModelConfig(n_head=4, n_embd=128).F == 384  # 341.3 rounded up to 64
    assert ModelConfig(n_head=4, n_embd=96, mlp="gelu").F == 384
    assert ModelConfig(n_head=4, n_embd=100, head_dim=32, n_kv_head=2).D == 32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(n_embd=100, n_head=6), "n_embd 100 is not a multiple of n_head 6"),
        (dict(n_embd=96, n_head=6, n_kv_head=4), "n_head 6 is not a multiple of n_kv_head 4"),
        (dict(n_embd=30, n_head=6), "head_dim 5 is odd"),
        (
            dict(position="learned", rope_scaling=RopeScaling(rope_type="linear", factor=2)),
            "rope_scaling needs position: rope",
        ),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=2, low_freq_factor=4.0)),
            "low_freq_factor 4.0 is not below high_freq_factor 4.0",
        ),
        (dict(rope_scaling=dict(factor=2)), "rope_scaling.rope_type"),
        (dict(dropout=1.0), "dropout"),
        (dict(n_layer=0), "n_layer"),
        (dict(n_head=0), "n_head"),
        (dict(mlp="relu"), "mlp"),
        (dict(n_layers=3), "n_layers"),
        (dict(labels=["spam"]), "labels has one class, 'spam'"),
        (dict(labels=["a", "b", "a"]), "labels has 'a' twice"),
    ],
)
def test_invalid_values_are_rejected_by_field(fields: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**fields)


def test_odd_head_size_is_allowed_without_rope() -> None:
    assert ModelConfig(n_embd=30, n_head=6, position="learned").D == 5


def test_change_derives_dependent_sizes_again_and_keeps_the_rest() -> None:
    c = ModelConfig(n_head=4, n_embd=128, n_kv_head=2, dropout=0.1)
    assert (c.change(n_layer=3).K, c.change(n_layer=3).dropout) == (2, 0.1)
    wider = c.change(n_embd=256)
    assert (wider.K, wider.D, wider.F) == (4, 64, 704)
    assert c.change(n_embd=256, n_kv_head=1).K == 1
    assert c.change(mlp="gelu").F == 512
    assert c.change(mlp="gelu", d_ff=100).F == 100
    with pytest.raises(ValueError, match="n_embd 130"):
        c.change(n_embd=130)


def test_a_configuration_is_frozen_and_survives_json() -> None:
    for name in PRESETS:
        c = ModelConfig.preset(name)
        assert ModelConfig.model_validate_json(c.model_dump_json()) == c
    scaled = c.change(rope_scaling=RopeScaling(rope_type="llama3", factor=8))
    assert ModelConfig(**scaled.model_dump()) == scaled
    with pytest.raises(ValidationError, match="frozen"):
        scaled.n_layer = 2  # type: ignore[misc]


def test_presets_by_name_with_replaced_fields() -> None:
    assert ModelConfig.preset("tiny", n_layer=4, dropout=0.1).n_layer == 4
    with pytest.raises(ValueError, match="no model preset 'gpt3': choose one of gpt2, gpt2-medium"):
        ModelConfig.preset("gpt3")
    with pytest.raises(ValidationError, match="width"):
        ModelConfig.preset("tiny", width=3)

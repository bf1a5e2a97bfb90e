import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_weights import add_noise
from torch import Tensor

from gptsmith.batch import Batch
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.model.gpt import GPTModel, gelu
from gptsmith.model.masks import causal, prefix, sliding_window
from gptsmith.train.loss import next_token_loss

B, T, H, V = 2, 12, 4, 50
POSITIONS = ["learned", "rope"]


def tiny(**fields: object) -> GPTModel:
    """A small model whose weights are large enough that everything in it matters."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=H, n_embd=32, n_kv_head=2, context_length=T, vocab_size=V)
    model = GPTModel(ModelConfig(**{**sizes, **fields})).eval()
    add_noise(model, 0.2)
    return model


def ids(B: int = B, T: int = T, V: int = V) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PRESETS)
def test_untrained_loss_of_every_preset_is_ln_v(name: str) -> None:
    """At its own width and vocabulary; the deep ones with two layers (depth is the next test)."""
    torch.manual_seed(0)
    c = ModelConfig.preset(name)
    c = ModelConfig(**{**c.model_dump(), "n_layer": min(c.n_layer, 2)})
    with torch.no_grad():
        logits = GPTModel(c)(ids(2, 16, c.vocab_size))
    loss = (logits.logsumexp(dim=-1) - logits.mean(dim=-1)).mean()  # over all possible targets
    assert float(loss) == pytest.approx(math.log(c.vocab_size), rel=0.02)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_initial_weights_are_scaled_by_depth_and_width(mlp: str) -> None:
    torch.manual_seed(0)
    for n_layer, n_embd, std in ((1, 128, 0.02), (18, 128, 0.02), (2, 1536, 0.02 / math.sqrt(2))):
        c = ModelConfig(
            n_layer=n_layer, n_head=2, n_embd=n_embd, vocab_size=300, mlp=mlp, d_ff=256,
            norm="layernorm", bias="all", context_length=64, position="learned",
            tie_embeddings=False,
        )  # fmt: skip
        for name, p in GPTModel(c).named_parameters():
            if p.dim() == 1:
                assert (p == (1 if name.endswith("norm.weight") else 0)).all(), name
            else:
                residual = name.endswith(("attention.proj.weight", "mlp.down.weight"))
                expected = std / math.sqrt(2 * n_layer) if residual else std
                assert float(p.detach().std()) == pytest.approx(expected, rel=0.06), name


def test_the_residual_stream_does_not_grow_with_depth() -> None:
    sizes = {}
    for n_layer in (2, 24):
        torch.manual_seed(0)
        model = GPTModel(ModelConfig(n_layer=n_layer, n_head=2, n_embd=64, vocab_size=V))
        model.final_norm = torch.nn.Identity()
        sizes[n_layer] = float(model.hidden(ids()).detach().std())
    assert sizes[24] == pytest.approx(sizes[2], rel=0.1)


def test_a_sequence_longer_than_the_context_is_rejected_with_both_numbers() -> None:
    for position in POSITIONS:
        with pytest.raises(ValueError, match=r"13 tokens .* context_length 12"):
            tiny(position=position)(ids(T=13))


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_outside_the_context_are_rejected(position: str) -> None:
    model = tiny(position=position)
    for first, bad in ((9, 12), (-1, -1)):
        at = torch.arange(first, first + 4)
        with pytest.raises(ValueError, match=f"position {bad} is outside context_length 12"):
            model(ids(T=4), positions=at)
        with pytest.raises(ValueError, match=f"position {bad} "):
            model(ids(T=4), positions=at.expand(B, 4))
    model(ids(T=4), positions=torch.arange(8, 12))


def test_rotation_is_relative_and_learned_positions_are_absolute() -> None:
    at = torch.arange(4)
    for position, same in (("rope", True), ("learned", False)):
        model = tiny(position=position)
        here, there = model(ids(T=4), positions=at), model(ids(T=4), positions=at + 8)
        assert torch.allclose(here, there, atol=1e-4) is same
        assert not torch.allclose(here, model(ids(T=4), positions=at * 2), atol=1e-2)


def test_earlier_outputs_do_not_depend_on_later_tokens() -> None:
    model = tiny()
    a = ids()
    b = a.clone()
    b[:, 7:] = (b[:, 7:] + 1) % V
    torch.testing.assert_close(model(a)[:, :7], model(b)[:, :7])
    assert not torch.allclose(model(a)[:, 7:], model(b)[:, 7:], atol=1e-2)


def test_first_token_does_not_depend_on_later_ones() -> None:
    model = tiny()
    torch.testing.assert_close(model(ids()[:1, :1]), model(ids())[:1, :1])


@pytest.mark.parametrize("mask", [sliding_window(3) & causal(), prefix(5)])
def test_dense_masks_of_every_shape_and_0_1_type_do_what_the_mask_does(mask: object) -> None:
    at = torch.arange(T)
    table = mask.dense(B, H, at, at)[0, 0]  # (T, T)
    model = tiny(mask=mask.expression)
    expected = model(ids())
    torch.testing.assert_close(tiny()(ids(), mask=mask), expected)
    model = tiny()
    assert not torch.allclose(model(ids()), expected, atol=1e-2)
    for shape in ((T, T), (B, T, T), (B, H, T, T), (B, 1, T, T)):
        for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32):
            dense = table.expand(shape).to(dtype)
            torch.testing.assert_close(model(ids(), mask=dense), expected)


def test_a_given_causal_mask_takes_the_place_of_that_of_the_config() -> None:
    model = tiny(mask="prefix(5)")
    torch.testing.assert_close(model(ids(), mask=causal()), tiny()(ids()))


def test_a_mask_may_differ_by_row_and_head() -> None:
    model = tiny()
    narrow, wide = (causal() & sliding_window(2)), causal()
    at = torch.arange(T)
    tables = [m.dense(1, 1, at, at)[0, 0] for m in (narrow, wide)]
    by_row = model(ids(), mask=torch.stack(tables))  # (B, T, T)
    torch.testing.assert_close(by_row[0], model(ids(), mask=narrow)[0])
    torch.testing.assert_close(by_row[1], model(ids(), mask=wide)[1])
    by_head = torch.stack([tables[h % 2] for h in range(H)]).expand(B, H, T, T)
    mixed = model(ids(), mask=by_head)
    assert not torch.allclose(mixed, model(ids(), mask=narrow), atol=1e-2)
    assert not torch.allclose(mixed, model(ids(), mask=wide), atol=1e-2)


def test_additive_masks_and_wrong_shapes_are_rejected() -> None:
    model = tiny()
    scores = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    for bad in (scores, torch.full((T, T), 0.5), torch.full((T, T), 2), scores.nan_to_num(-1e9)):
        with pytest.raises(ValueError, match="values other than 0 and 1"):
            model(ids(), mask=bad)
    for shape in ((T,), (T, T + 1), (B + 1, T, T), (B, H + 1, T, T)):
        with pytest.raises(ValueError, match=r"mask of shape"):
            model(ids(), mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("position", POSITIONS)
def test_query_without_keys_gives_no_nan_in_training(position: str) -> None:
    model = tiny(position=position).train()
    table = torch.ones(T, T).tril().bool()
    table[3] = table[:, 3] = False  # position 3 sees nothing and nobody sees it
    logits = model(ids(), mask=table)
    F.cross_entropy(logits.flatten(0, 1), ids().flatten()).backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    other = ids()
    other[:, 3] = (other[:, 3] + 1) % V
    changed = (model(other, mask=table) - logits).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dense", [False, True])
def test_documents_in_one_row_equal_documents_apart(position: str, dense: bool) -> None:
    model = tiny(position=position)
    lengths = [[5, 4, 3], [1, 11]]
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]
    )
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    rows = ids()
    mask = torch.ones(T, T).tril() if dense else None
    together = model(rows, documents=documents, positions=positions, mask=mask)
    for row, n in enumerate(lengths):
        apart = torch.cat([model(part[None])[0] for part in rows[row].split(n)])
        torch.testing.assert_close(together[row], apart, rtol=1e-4, atol=1e-4)


def test_documents_are_combined_with_a_given_mask() -> None:
    model = tiny(mask="causal() & sliding_window(3)")
    documents = torch.tensor([[0] * 5 + [1] * 7] * B)
    at = torch.arange(T)
    table = model.mask.dense(1, 1, at, at)[0, 0] & (documents[0][:, None] == documents[0][None])
    torch.testing.assert_close(model(ids(), documents=documents), model(ids(), mask=table))


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = tiny(dropout=0.2).train()
        model.activation_checkpointing = recompute
        torch.manual_seed(3)
        next_token_loss(model, Batch(ids(), ids())).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_dropout_acts_in_training_only() -> None:
    model = tiny(dropout=0.5)
    assert torch.equal(model(ids()), model(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))


@pytest.mark.parametrize("name", ["tiny", "fast", "smollm2-135m"])
def test_bfloat16_autocast_stays_close_to_float32(name: str) -> None:
    torch.manual_seed(0)
    c = ModelConfig.preset(name)
    c = ModelConfig(**{**c.model_dump(), "n_layer": 2, "vocab_size": V, "context_length": 80})
    model = GPTModel(c)
    rows = ids(2, 80)
    full = model(rows).detach()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(rows).detach()
    assert half.dtype == torch.bfloat16
    assert float((half - full).abs().max()) < 0.02 * float(full.abs().max())


def test_the_compiled_gelu_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-12, 12, 2001)
    expected = gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("code", "expression"),
    [
        ("def mine(b, h, q, k): return (q >= k) & (q - k < 3)", "causal() & sliding_window(3)"),
        ("from gptsmith.model import masks\nmine = masks.causal()", "causal()"),
    ],
)
def test_mask_from_a_file_needs_trust_code(tmp_path: Path, code: str, expression: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V)
    c = ModelConfig(**sizes, mask="mine.py:mine")
    with pytest.raises(ValueError, match="trust"):
        GPTModel(c, mask_folder=tmp_path)
    torch.manual_seed(0)
    mine = GPTModel(c, mask_folder=tmp_path, trust_code=True)
    torch.manual_seed(0)
    same = GPTModel(c.change(mask=expression))
    torch.testing.assert_close(mine(ids()), same(ids()))

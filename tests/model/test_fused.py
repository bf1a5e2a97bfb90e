"""Norm and rotation with backward passes of their own: the values and gradients of the formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_weights import randomize
from torch import Tensor

from gptsmith.batch import Batch
from gptsmith.model import fused
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import next_token_loss

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2e-2}
B, T, H, D = 2, 5, 3, 8


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """What the function returns, and the gradients of a weighting of it."""
    out = function(*inputs)
    weights = torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).double().norm() / b.double().norm()) < TOLERANCE[dtype]


def heads(dtype: torch.dtype) -> Tensor:
    """Queries (B, T, H, D) as a part of a fused projection: not contiguous."""
    torch.manual_seed(0)
    return torch.randn(B, T, H + 2, D, dtype=dtype).split((H, 2), dim=2)[0].requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = heads(dtype), torch.rand(D, dtype=wide, requires_grad=True)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.to(wide), (D,), weight, 1e-3).to(dtype)

    found = results(lambda x, weight: fused.RMSNorm.apply(x, weight, 1e-3), x, weight)
    assert_near(found, results(formula, x, weight), dtype)


def test_norm_of_zeros_is_zero_and_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.zeros(2, D, requires_grad=True), torch.ones(D)
    y = fused.RMSNorm.apply(x, weight, 1e-6)
    y.sum().backward()
    assert not y.any()
    torch.testing.assert_close(x.grad, torch.full((2, D), 1e3))
    assert weight.grad is None


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotation(dtype: torch.dtype, rows: int) -> None:
    angles = torch.rand(rows, T, 1, D // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def formula(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    found = results(lambda x: fused.Rotation.apply(x, cos, sin), heads(dtype))
    assert_near(found, results(formula, heads(dtype)), dtype)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_has_the_gradients_of_plain_operations(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, context_length=80, vocab_size=20, qk_norm=True
    )
    model = GPTModel(config)
    randomize(model, size=0.1)
    ids = torch.randint(20, (2, 81))
    batch = Batch(ids[:, :-1], ids[:, 1:].contiguous())

    def gradient() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = next_token_loss(model, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])

    found = gradient()
    monkeypatch.setattr(fused, "applies", lambda x: False)
    expected = gradient()
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < (0.03 if bf16 else 1e-4)


CALLS: list[Callable[[Tensor], Tensor]] = [
    lambda x: fused.RMSNorm.apply(x, torch.ones(D), 1e-6),
    lambda x: fused.Rotation.apply(x, x.detach()[..., : D // 2], x.detach()[..., D // 2 :]),
    lambda x: fused.CausalAttention.apply(x, x, x),
]


@pytest.mark.parametrize("function", CALLS, ids=["norm", "rotation", "attention"])
def test_a_second_derivative_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    """Not computed with what was saved taken as constant."""
    x = torch.randn(B, T, H, D, requires_grad=True)
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_transforms_of_torch_func_see_plain_operations() -> None:
    """Gradients of each row, by vmap of grad: those of autograd, row by row."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=20, qk_norm=True
    )
    model = GPTModel(config)
    randomize(model, size=0.1)
    ids = torch.randint(20, (2, 8))

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # blocked attention, too
            logits: Tensor = torch.func.functional_call(model, weights, (row[None],))
        return logits.float().square().mean()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for at, row in enumerate(ids):
        expected = torch.autograd.grad(
            loss(dict(model.named_parameters()), row), [*model.parameters()]
        )
        found = torch.cat([rows[name][at].flatten() for name in weights])
        flat = torch.cat([g.flatten() for g in expected])
        assert float((found - flat).norm() / flat.norm()) < 0.03

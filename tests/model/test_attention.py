import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.model import fused
from gptsmith.model.attention import CausalMask, attention, blocked_causal

BF16 = torch.bfloat16

B, H, D = 2, 4, 16


def inputs(T: int, K: int = H, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, H, T, D), (B, K, T, D), (B, K, T, D))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention by the formula; a query that may attend to nothing gives zeros."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(D)).exp() * mask
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30) @ v


def results(function: object, *args: Tensor) -> list[Tensor]:
    """What the function returns, and the gradients of a weighting of it."""
    out = function(*args)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), args)]


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "dense", "blind rows"])
def test_attention_is_softmax_attention(K: int, kind: str) -> None:
    T = 13
    mask = torch.ones(T, T).tril().bool()
    if kind == "blind rows":
        mask[[0, 5, 12]] = False
    given = None if kind == "causal" else mask.expand(B, 1, T, T)
    ours = results(lambda q, k, v: attention(q, k, v, given), *inputs(T, K))
    expected = results(lambda q, k, v: by_hand(q, k, v, mask), *inputs(T, K))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if kind == "blind rows":
        assert (ours[0][:, :, [0, 5, 12]] == 0).all()
        assert (ours[1][:, :, [0, 5, 12]] == 0).all()


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130, 523])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [blocked_causal, fused.CausalAttention.apply])
def test_the_blocked_forms_equal_the_fused_kernel(
    form: Callable[..., Tensor], T: int, dtype: torch.dtype
) -> None:
    blocked = results(form, *inputs(T, dtype=dtype))
    exact = results(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *(x.detach().float().requires_grad_() for x in inputs(T, dtype=dtype)),
    )
    for a, b in zip(blocked, exact, strict=True):
        assert a.dtype == dtype
        error = float((a.float() - b).norm() / b.norm().clamp(min=1))
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_bfloat16_training_takes_the_blocked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, apply = [], fused.CausalAttention.apply
    monkeypatch.setattr(
        fused.CausalAttention, "apply", lambda q, k, v: taken.append(q.shape[2]) or apply(q, k, v)
    )
    q, k, v = inputs(64, dtype=torch.bfloat16)
    trained = attention(q, k, v, None)
    assert taken == [64]
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v, None), trained, rtol=0.05, atol=0.02)
    attention(q, k, v, None, 0.1)
    attention(q, k, v, torch.ones(64, 64).bool().expand(1, 1, 64, 64))
    attention(*inputs(64), None)
    attention(*inputs(300, dtype=torch.bfloat16), None)
    assert taken == [64]


@pytest.mark.parametrize("T", [64, 300])
def test_causal_mask_takes_the_blocked_form(T: int) -> None:
    """Documents of unequal length, and one query that sees nothing."""
    documents = torch.arange(T) // 37
    allowed = (documents[:, None] == documents).tril()[None, None]
    allowed[..., T // 2, :] = False
    ours = results(lambda q, k, v: attention(q, k, v, CausalMask(allowed)), *inputs(T, dtype=BF16))
    expected = results(lambda q, k, v: attention(q, k, v, allowed), *inputs(T))
    for a, b in zip(ours, expected, strict=True):
        assert float((a.float() - b).norm() / b.norm().clamp(min=1)) < 1e-2
    assert float(ours[0][:, :, T // 2].abs().max()) == 0


def test_dropout_of_attention_weights() -> None:
    q, k, v = inputs(32)
    mask = torch.ones(32, 32).tril().bool().expand(1, 1, 32, 32)
    for given in (None, mask):
        torch.manual_seed(0)
        mean = torch.stack([attention(q, k, v, given, 0.3) for _ in range(300)]).mean(dim=0)
        assert float((mean - attention(q, k, v, None)).detach().abs().mean()) < 0.03
        assert not torch.equal(attention(q, k, v, given, 0.3), attention(q, k, v, given, 0.3))


def test_one_compiled_graph_serves_every_length() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, None), fullgraph=True, backend="aot_eager"
    )
    for T in (5, 7, 9):
        q, k, v = inputs(T)
        torch._dynamo.maybe_mark_dynamic(q, 2)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, None))

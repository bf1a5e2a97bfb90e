from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import loss as loss_module
from gptsmith.train.loss import (
    CHUNK_BYTES,
    IGNORE,
    Batch,
    LinearCrossEntropy,
    chunk_rows,
    next_token_loss,
)

N, C, V = 23, 8, 31


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(N, C, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[[0, 5, 6, 7, 22]] = IGNORE
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, 22, 23, 1000])
def test_value_and_gradients_are_those_of_cross_entropy(rows: int) -> None:
    hidden, weight, targets = case()
    ours = LinearCrossEntropy.apply(hidden, weight, targets, torch.float32, rows)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    factor = 1 / 18  # the step divides by the number of targets
    grads = torch.autograd.grad(ours * factor, (hidden, weight))
    for a, b in zip(grads, torch.autograd.grad(expected * factor, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (grads[0][targets == IGNORE] == 0).all()


def test_without_gradients_and_without_targets() -> None:
    hidden, weight, targets = case()
    expected = plain(hidden, weight, targets).detach()
    with torch.no_grad():
        ours = LinearCrossEntropy.apply(hidden, weight, targets, torch.float32, 4)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    nothing = torch.full_like(targets, IGNORE)
    none = LinearCrossEntropy.apply(hidden, weight, nothing, torch.float32, 4)
    assert float(none.detach()) == 0
    assert all((g == 0).all() for g in torch.autograd.grad(none, (hidden, weight)))


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = case()
    big = (hidden.detach() * 1e4).requires_grad_()
    ours = LinearCrossEntropy.apply(big, weight, targets, torch.float32, 4)
    torch.testing.assert_close(ours, plain(big, weight, targets), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours, (big, weight)))


def test_bfloat16_is_close_and_gradients_have_their_owners_dtype() -> None:
    hidden, weight, targets = case(torch.bfloat16)
    ours = LinearCrossEntropy.apply(hidden, weight, targets, torch.bfloat16, 4)
    exact = hidden.detach().float().requires_grad_()
    expected = plain(exact, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.01, atol=0)
    grads = torch.autograd.grad(ours, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for a, b in zip(grads, torch.autograd.grad(expected, (exact, weight)), strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 20 * V * 4, 2**27])
def test_next_token_loss_is_the_loss_of_the_logits(
    tied: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=12, vocab_size=V)
    model = GPTModel(ModelConfig(**sizes, tied=tied))
    with torch.no_grad():
        model.embedding.token.weight.mul_(20)
    ids = torch.randint(V, (3, 13))
    targets = ids[:, 1:].clone()
    targets[1, 4:] = IGNORE
    documents = (torch.arange(12) // 5).expand(3, 12)
    positions = (torch.arange(12) % 5).expand(3, 12)

    def run(loss: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        value = loss()
        value.backward()
        return [value.detach(), *(p.grad for p in model.parameters())]

    logits = lambda: model(ids[:, :-1], documents=documents, positions=positions)  # noqa: E731
    expected = run(
        lambda: F.cross_entropy(
            logits().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
    )
    batch = Batch(ids[:, :-1], targets, documents=documents, positions=positions)
    ours = run(lambda: next_token_loss(model, batch)[0])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert int(next_token_loss(model, batch)[1]) == 3 * 12 - 8


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_the_logits_never_stand_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    B, T, V = 4, 32, 2000
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * V * 4)  # eight rows
    sizes = dict(n_layer=1, n_head=1, n_embd=4, d_ff=8, context_length=T, vocab_size=V)
    model = GPTModel(ModelConfig(**sizes))
    ids = torch.randint(V, (B, T))
    with Largest() as largest:
        next_token_loss(model, Batch(ids, ids))[0].backward()
    assert largest.numel == 8 * V
    with Largest() as largest:
        model(ids)
    assert largest.numel == B * T * V


def test_chunks_are_equal_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1000)
    assert chunk_rows(100, 10, cpu) == 25  # 4 bytes x 10 x 25 = 1000
    assert chunk_rows(101, 10, cpu) == 21  # five chunks
    assert chunk_rows(7, 10, cpu) == 7
    assert chunk_rows(3, 10_000, cpu) == 1
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 1000})
    assert chunk_rows(100, 10, torch.device("meta")) == 25  # unknown devices as the CPU


def test_a_batch_moves_with_all_its_parts() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    there = Batch(ids, ids, documents=ids, name="samples 0..0").to(torch.device("meta"))
    assert {x.device.type for x in (there.inputs, there.targets, there.documents)} == {"meta"}
    assert (there.positions, there.name) == (None, "samples 0..0")

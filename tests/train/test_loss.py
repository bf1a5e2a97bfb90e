import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import loss as loss_module
from gptsmith.train.loss import (
    CHUNK_BYTES,
    LinearCrossEntropy,
    chunk_rows,
    classification_loss,
    next_token_loss,
)

N, C, V = 23, 8, 31


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(N, C, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[[0, 5, 6, 7, 22]] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, 22, 23, 1000])
def test_value_and_gradients_match_cross_entropy(rows: int) -> None:
    hidden, weight, targets = case()
    ours = LinearCrossEntropy.apply(hidden, weight, targets, torch.float32, rows)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    factor = 1 / 18  # the step divides by the number of targets
    grads = torch.autograd.grad(ours * factor, (hidden, weight))
    for a, b in zip(grads, torch.autograd.grad(expected * factor, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (grads[0][targets == IGNORE_INDEX] == 0).all()


def test_without_gradients_and_without_targets() -> None:
    hidden, weight, targets = case()
    expected = plain(hidden, weight, targets).detach()
    with torch.no_grad():
        ours = LinearCrossEntropy.apply(hidden, weight, targets, torch.float32, 4)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    nothing = torch.full_like(targets, IGNORE_INDEX)
    none = LinearCrossEntropy.apply(hidden, weight, nothing, torch.float32, 4)
    assert float(none.detach()) == 0
    assert all((g == 0).all() for g in torch.autograd.grad(none, (hidden, weight)))


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = case()
    big = (hidden.detach() * 1e4).requires_grad_()
    ours = LinearCrossEntropy.apply(big, weight, targets, torch.float32, 4)
    torch.testing.assert_close(ours, plain(big, weight, targets), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours, (big, weight)))


def test_bfloat16_is_close_and_gradients_have_the_dtype_of_their_tensor() -> None:
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


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 20 * V * 4, 2**27])
def test_next_token_loss_matches_the_loss_of_the_logits(
    tie_embeddings: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=12, vocab_size=V)
    model = GPTModel(ModelConfig(**sizes, tie_embeddings=tie_embeddings))
    with torch.no_grad():
        model.embedding.token.weight.mul_(20)
    ids = torch.randint(V, (3, 13))
    targets = ids[:, 1:].clone()
    targets[1, 4:] = IGNORE_INDEX
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
            logits().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
    )
    batch = Batch(ids[:, :-1], targets, documents=documents, positions=positions)
    ours = run(lambda: next_token_loss(model, batch))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert batch.count == 3 * 12 - 8


class Memory(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and the most bytes of such
    tensors in use at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                self.hold(x.untyped_storage())
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, storage._cdata)

    def release(self, key: int) -> None:
        self.now -= self.known.pop(key)


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    B, T, V = 4, 32, 2000
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * V * 4)  # eight rows
    sizes = dict(n_layer=1, n_head=1, n_embd=4, d_ff=8, context_length=T, vocab_size=V)
    model = GPTModel(ModelConfig(**sizes))
    ids = torch.randint(V, (B, T))
    with Memory() as used:
        next_token_loss(model, Batch(ids, ids)).backward()
    assert used.largest == 8 * V
    with Memory() as used:
        model(ids)
    assert used.largest == B * T * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_memory_is_about_two_chunks_of_logits(dtype: torch.dtype, gradients: bool) -> None:
    N, C, V, rows = 400, 2, 1000, 50
    hidden = torch.randn(N, C, requires_grad=gradients)
    weight = torch.randn(V, C, requires_grad=gradients)
    with Memory() as used:
        LinearCrossEntropy.apply(hidden, weight, torch.randint(V, (N,)), dtype, rows)
    assert used.peak < 2.5 * rows * V * 4


def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> int:
    """How many matrix products one evaluation of the loss takes, in one chunk."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            nonlocal count
            count += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    with Count():
        LinearCrossEntropy.apply(hidden, weight, targets, torch.float32, N)
    return count


def test_only_required_gradients_are_computed() -> None:
    """A frozen head (LoRA) saves a third of the work, an evaluation two thirds."""
    hidden, weight, targets = case()
    assert products(hidden, weight, targets) == 3
    assert products(hidden, weight.detach(), targets) == 2
    assert products(hidden.detach(), weight, targets) == 2
    assert products(hidden.detach(), weight.detach(), targets) == 1
    both = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    for i, frozen in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        loss = LinearCrossEntropy.apply(*frozen, targets, torch.float32, 4)
        (gradient,) = torch.autograd.grad(loss, (hidden, weight)[i])
        torch.testing.assert_close(gradient, both[i], rtol=1e-5, atol=1e-6)


def test_no_gradients_are_computed_under_no_grad() -> None:
    model = GPTModel(
        ModelConfig(n_layer=1, n_head=1, n_embd=4, d_ff=8, context_length=8, vocab_size=V)
    )
    ids = torch.randint(V, (1, 8))
    made = {}
    real = LinearCrossEntropy.forward

    def forward(ctx: object, *given: Tensor) -> Tensor:
        made[len(made)] = ctx.needs_input_grad[:2]
        return real(ctx, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearCrossEntropy, "forward", staticmethod(forward))
        with torch.no_grad():
            next_token_loss(model, Batch(ids, ids))
        next_token_loss(model, Batch(ids, ids))
    assert made == {0: (False, False), 1: (True, True)}


def test_loss_scale_overflows_fp16_only_in_fp16_results() -> None:
    hidden, weight, targets = case()
    exact = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    scale = 2.0**20
    assert float(exact[0].abs().max()) * scale > 65504
    loss = LinearCrossEntropy.apply(hidden, weight, targets, torch.float16, 4) * scale
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert float((a / scale - b).norm() / b.norm()) < 0.01
    half = hidden.detach().half().requires_grad_()
    loss = LinearCrossEntropy.apply(half, weight, targets, torch.float16, 4) * scale
    (overflow,) = torch.autograd.grad(loss, half)
    assert not overflow.isfinite().all()  # which the scaler sees, and lowers the scale


def test_sums_over_many_rows_do_not_overflow_fp16() -> None:
    rows = 4096
    hidden = torch.full((rows, 8), 60.0)
    weight = torch.zeros(3, 8, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long)
    loss = LinearCrossEntropy.apply(hidden, weight, targets, torch.float16, rows)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3])[:, None].expand(3, 8) * rows * 60
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


def test_chunks_are_equal_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1000)
    assert chunk_rows(100, 10, cpu) == 25  # 4 bytes x 10 x 25 = 1000
    assert chunk_rows(101, 10, cpu) == 21  # five chunks
    assert chunk_rows(7, 10, cpu) == 7
    assert chunk_rows(3, 10_000, cpu) == 1
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 1000})
    assert chunk_rows(100, 10, torch.device("meta")) == 25  # unknown devices as the CPU


def test_batch_to_moves_every_tensor() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    there = Batch(ids, ids, documents=ids, name="samples 0..0", tokens=1).to(torch.device("meta"))
    assert {x.device.type for x in (there.inputs, there.targets, there.documents)} == {"meta"}
    assert (there.positions, there.name, there.tokens) == (None, "samples 0..0", 1)


class Scored(GPTModel):
    """A language model's body under a head for three classes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 3, bias=False)


@pytest.mark.parametrize("autocast", [False, True])
def test_classification_loss_is_the_cross_entropy_at_the_last_tokens(autocast: bool) -> None:
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=12, vocab_size=V)
    model = Scored(ModelConfig(**sizes))
    with torch.no_grad():
        model.score.weight.mul_(20)
    rows = [torch.randint(V, (n,)) for n in (12, 3, 7)]
    classes = [2, 0, 1]
    inputs = torch.zeros(4, 12, dtype=torch.long)  # the last row has no class
    targets = torch.full((4, 12), IGNORE_INDEX)
    for i, row in enumerate(rows):
        inputs[i, : len(row)] = row
        targets[i, len(row) - 1] = classes[i]

    def gradients(loss: Tensor) -> list[Tensor]:
        used = [p for n, p in model.named_parameters() if n != "head.weight"]
        return [loss.detach(), *torch.autograd.grad(loss, used)]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        summed = classification_loss(model, Batch(inputs, targets))
        alone = [model.score(model.hidden(row[None])[0, -1]) for row in rows]
    expected = sum(-F.log_softmax(x.float(), -1)[c] for x, c in zip(alone, classes, strict=True))
    assert summed.dtype == torch.float32
    assert Batch(inputs, targets).count == 3
    close = dict(rtol=0.05, atol=0.05) if autocast else dict(rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(summed), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_classification_loss_stays_inside_documents() -> None:
    """Padding may be another document: then no mask whatever lets a row see it."""
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=12, vocab_size=V)
    model = Scored(ModelConfig(**sizes, mask="bidirectional()"))
    inputs = torch.randint(V, (2, 12))
    targets = torch.full((2, 12), IGNORE_INDEX)
    targets[:, 4] = 1
    documents = (torch.arange(12) > 4).long().expand(2, 12)
    other = inputs.clone()
    other[:, 5:] = 0
    a, b = (
        classification_loss(model, Batch(ids, targets, documents=documents))
        for ids in (inputs, other)
    )
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a, classification_loss(model, Batch(inputs, targets)))

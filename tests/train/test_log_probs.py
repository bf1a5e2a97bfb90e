"""Log-probabilities of targets, from which the losses of preferences and rewards are made."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import CHUNK_BYTES, TargetLogProbs, token_log_probs

B, T, V = 3, 12, 31


def small(**fields: object) -> GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V)
    model = GPTModel(ModelConfig(**{**sizes, **fields}))
    with torch.no_grad():
        model.embedding.token.weight.mul_(20)
    return model


def masked() -> Batch:
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, :5] = targets[1] = IGNORE_INDEX
    return Batch(ids[:, :-1], targets)


@pytest.mark.parametrize("chunk_bytes", [1, 5 * V * 4, 2**27])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_values_and_gradients_are_those_of_the_logits(
    chunk_bytes: int, tie_embeddings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    model, batch = small(tie_embeddings=tie_embeddings), masked()
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(1))

    def run(log_probs: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        found = log_probs()
        (found * weights).sum().backward()
        return [found.detach(), *(p.grad for p in model.parameters())]

    def plainly() -> Tensor:
        log_p = model(batch.inputs).log_softmax(-1)
        found = log_p.gather(2, batch.targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return found * (batch.targets != IGNORE_INDEX)

    for a, b in zip(run(lambda: token_log_probs(model, batch)), run(plainly), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_entropies_are_those_of_the_predictions_and_have_no_gradient() -> None:
    model, batch = small(), masked()
    log_probs, entropies = token_log_probs(model, batch, entropy=True)
    assert log_probs.requires_grad
    assert not entropies.requires_grad
    expected = torch.distributions.Categorical(logits=model(batch.inputs).detach()).entropy()
    is_target = batch.targets != IGNORE_INDEX
    torch.testing.assert_close(entropies, expected * is_target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_probs, token_log_probs(model, batch))
    log_probs.sum().backward()  # the entropy beside it changes nothing


def test_rows_that_begin_alike_have_the_values_and_gradients_of_separate_ones() -> None:
    model, batch = small(), masked()
    inputs = batch.inputs.clone()
    inputs[1, :7] = inputs[2, :7] = inputs[0, :7]
    same_as = torch.arange(B * T).view(B, T)
    same_as[1:, :7] = same_as[0, :7]
    targets = batch.targets.clone()
    targets[:, 4:] = inputs[:, 4:]
    found = []
    for batch in (
        replace(batch, inputs=inputs, targets=targets, same_as=x) for x in (None, same_as)
    ):
        log_probs, entropies = token_log_probs(model, batch, entropy=True)
        loss = (log_probs * torch.arange(B * T).view(B, T)).sum()
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        found.append([log_probs.detach(), entropies, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_without_targets_the_gradient_is_zero() -> None:
    model, batch = small(), masked().without_targets()
    found = token_log_probs(model, batch)
    found.sum().backward()
    assert (found == 0).all()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_without_gradients_the_values_are_the_same() -> None:
    model, batch = small(), masked()
    with torch.no_grad():
        assert torch.equal(token_log_probs(model, batch), token_log_probs(model, batch).detach())


def test_a_frozen_head_and_frozen_hidden_states_get_no_gradient() -> None:
    hidden = torch.randn(7, 4, requires_grad=True)
    weight = torch.randn(V, 4, requires_grad=True)
    targets = torch.arange(7)

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        return TargetLogProbs.apply(hidden, weight, targets, torch.float32, 3, False)[0].sum()

    both = torch.autograd.grad(log_probs(hidden, weight), (hidden, weight))
    for i, given in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        (alone,) = torch.autograd.grad(log_probs(*given), (hidden, weight)[i])
        assert torch.equal(alone, both[i])


def test_fp16_has_room_for_a_scaled_gradient() -> None:
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(V, 8, requires_grad=True)
    targets, scale = torch.arange(40) % V, 2.0**22

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        found, _ = TargetLogProbs.apply(hidden, weight, targets, dtype, 16, False)
        return torch.autograd.grad(found.sum() * scale, (hidden, weight))

    for a, b in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert a.isfinite().all()
        assert float((a - b).norm() / b.norm()) < 0.01


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_only_chunks_of_logits_exist_and_only_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = 4000
    model, batch = small(vocab_size=wide, n_embd=4, n_head=1), masked()
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * wide * 4)
    with Largest() as used:
        token_log_probs(model, batch).sum().backward()
    assert used.elements <= 8 * wide
    few = batch.targets.clone()
    few[0, 6:] = few[2] = IGNORE_INDEX  # one is left
    with Largest() as used, torch.no_grad():
        token_log_probs(model, replace(batch, targets=few))
    assert used.elements == wide * 4  # the embedding

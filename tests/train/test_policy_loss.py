"""The loss of reinforcement learning: clipped ratios, advantages, the KL penalty."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, PolicyBatch
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.policy_loss import PolicyLoss

B, T, V = 4, 12, 31


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V))
    with torch.no_grad():
        model.embedding.token.weight.mul_(20)
    return model


@pytest.fixture
def batch(model: GPTModel) -> PolicyBatch:
    """Completions of 3 to 8 tokens, whose old and reference log-probabilities are near."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (B, T + 1), generator=random)
    targets = ids[:, 1:].clone()
    for row, (start, stop) in enumerate(((2, 10), (4, 9), (1, 4), (5, 12))):
        targets[row, :start] = targets[row, stop:] = IGNORE_INDEX
    is_target = targets != IGNORE_INDEX
    near = log_probs(model, ids[:, :-1], targets).detach()
    old, reference = (
        torch.where(is_target, near + 0.3 * torch.randn(B, T, generator=random), 0.0)
        for _ in range(2)
    )
    return PolicyBatch(
        ids[:, :-1], targets, advantages=torch.randn(B, T, generator=random),
        weights=torch.tensor([1.0, 2.0, 0.5, 1.0]), copies=torch.tensor([1, 3, 1, 2]),
        old=old, reference=reference,
    )  # fmt: skip


def log_probs(model: GPTModel, inputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    log_p = (model(inputs) / temperature).log_softmax(-1)
    return log_p.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)


def gradients(model: GPTModel, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("sampled_by", ["older policy", "this policy"])
def test_value_gradient_and_metrics_are_those_of_the_formula(
    model, batch, sampled_by, kl, temperature
):
    if sampled_by == "this policy":
        batch = replace(batch, old=None)
    loss = PolicyLoss(clip_low=0.2, clip_high=0.28, kl=kl, temperature=temperature)
    found, metrics = loss(model, batch)
    ours = gradients(model, found)

    expected, clipped, divergence = torch.zeros(()), 0, 0.0
    log_p = log_probs(model, batch.inputs, batch.targets, temperature)
    for row in range(B):
        for t in range(T):
            if batch.targets[row, t] == IGNORE_INDEX:
                continue
            p = log_p[row, t]
            ratio = (p - (p.detach() if batch.old is None else batch.old[row, t])).exp()
            a = batch.advantages[row, t]
            limited = ratio.clamp(0.8, 1.28)
            token = -torch.minimum(ratio * a, limited * a)
            copies = int(batch.copies[row])
            clipped += copies * int(limited * a < ratio * a)
            d = batch.reference[row, t] - p
            k3 = d.exp() - d - 1
            divergence += copies * k3.item()
            expected = expected + copies * batch.weights[row] * (token + kl * k3)
    theirs = gradients(model, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=1e-4)
    assert metrics["clipped"].item() == clipped
    assert (clipped > 0) == (sampled_by == "older policy")
    assert metrics.keys() == ({"entropy", "clipped", "kl"} if kl else {"entropy", "clipped"})
    if kl:
        assert metrics["kl"].item() == pytest.approx(divergence, rel=1e-5)


def test_one_update_has_the_gradient_of_the_policy_gradient(model, batch):
    """REINFORCE: advantage times the gradient of the log-probability."""
    batch = replace(batch, old=None)
    ours = gradients(model, PolicyLoss()(model, batch)[0])
    is_target = batch.targets != IGNORE_INDEX
    log_p = log_probs(model, batch.inputs, batch.targets) * is_target
    factors = batch.advantages * (batch.weights * batch.copies).unsqueeze(1)
    for a, b in zip(ours, gradients(model, -(factors * log_p).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=1e-4)


def test_the_count_is_that_of_all_completions(batch):
    assert batch.count == 8 + 3 * 5 + 3 + 2 * 7


def test_a_batch_without_targets_has_no_loss_and_no_gradient(model, batch):
    found, metrics = PolicyLoss(kl=0.1)(model, batch.without_targets())
    assert found.item() == 0
    assert all(value == 0 for value in metrics.values())
    assert all(not g.any() for g in gradients(model, found))


def test_a_batch_keeps_its_fields_on_the_way_to_a_device(batch):
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, PolicyBatch)
    assert torch.equal(moved.advantages, batch.advantages)
    assert torch.equal(moved.old, batch.old)

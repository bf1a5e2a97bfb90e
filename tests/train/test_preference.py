"""Losses of preferences, by their formulas and beside those of TRL (test_preference_trl.py)."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptsmith.batch import IGNORE_INDEX, PairBatch
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.preference import METRICS, PreferenceLoss, answer_log_probs

T, V = 10, 23


def model() -> GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V)
    made = GPTModel(ModelConfig(**sizes))
    with torch.no_grad():
        made.embedding.token.weight.mul_(30)
    return made


def pairs(n: int = 3) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2 * n, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(2 * n):  # answers of different lengths
        targets[row, : 3 + row % 4] = IGNORE_INDEX
        targets[row, 8 + row % 3 :] = IGNORE_INDEX
    reference = -20 * torch.rand(2 * n, generator=generator)
    return PairBatch(ids[:, :-1], targets, count=n, reference=reference)


def by_hand(loss: PreferenceLoss, made: GPTModel, batch: PairBatch) -> torch.Tensor:
    """The mean over the pairs, one pair at a time, as the papers write it."""
    losses = []
    for i in range(batch.count):
        sums, means = [], []
        for row in (i, i + batch.count):
            log_p = made(batch.inputs[row : row + 1])[0].log_softmax(-1)
            at = (batch.targets[row] != IGNORE_INDEX).nonzero().squeeze(1)
            answer = log_p[at, batch.targets[row][at]]
            assert batch.reference is not None
            ref = 0.0 if loss.kind == "simpo" else batch.reference[row]
            sums.append(answer.sum() - ref)
            means.append((answer.sum() - ref) / len(at))
        beta, smooth = loss.beta, loss.label_smoothing
        if loss.kind == "ipo":
            losses.append((means[0] - means[1] - 1 / (2 * beta)) ** 2)
            continue
        h = (sums if loss.kind == "sigmoid" else means)[0] - (
            sums if loss.kind == "sigmoid" else means
        )[1]
        z = beta * h - (loss.gamma if loss.kind == "simpo" else 0)
        losses.append(-(1 - smooth) * F.logsigmoid(z) - smooth * F.logsigmoid(-z))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "loss",
    [
        PreferenceLoss("sigmoid", 0.1),
        PreferenceLoss("sigmoid", 0.3, label_smoothing=0.2),
        PreferenceLoss("ipo", 0.2),
        PreferenceLoss("sigmoid_norm", 2.0),
        PreferenceLoss("simpo", 2.5, gamma=0.7),
    ],
    ids=lambda loss: loss.kind,
)
def test_losses_and_gradients_are_those_of_the_formulas(loss: PreferenceLoss) -> None:
    made, batch = model(), pairs()
    ours = loss(made, batch)[0] / batch.count
    expected = by_hand(loss, made, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    grads = (torch.autograd.grad(x, [*made.parameters()]) for x in (ours, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_metrics_are_sums_over_the_pairs() -> None:
    made, batch = model(), pairs()
    log_p = answer_log_probs(made, batch).detach()
    _, metrics = PreferenceLoss("sigmoid", 0.1)(made, batch)
    assert tuple(metrics) == METRICS
    assert batch.reference is not None
    gain = log_p - batch.reference
    margin = 0.1 * (gain[:3] - gain[3:])
    assert float(metrics["accuracy"]) == int((margin > 0).sum())
    torch.testing.assert_close(metrics["margin"], margin.sum())
    torch.testing.assert_close(metrics["chosen_logp"], log_p[:3].sum())
    torch.testing.assert_close(metrics["rejected_logp"], log_p[3:].sum())
    assert not any(value.requires_grad for value in metrics.values())


def test_the_reference_itself_has_half_of_the_pairs_right() -> None:
    made, batch = model(), pairs()
    same = PairBatch(
        batch.inputs, batch.targets, count=3, reference=answer_log_probs(made, batch).detach()
    )
    loss, metrics = PreferenceLoss("sigmoid", 0.1)(made, same)
    assert float(loss.detach()) / 3 == pytest.approx(math.log(2))
    assert float(metrics["accuracy"]) / 3 == 0.5


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sigmoid_norm", "simpo"])
def test_a_batch_without_targets_counts_nothing(kind: str) -> None:
    """With several ranks, one that has no pairs left in a turn computes such a batch."""
    made = model()
    loss, metrics = PreferenceLoss(kind, 0.5, gamma=0.5)(made, pairs().without_targets())  # type: ignore[arg-type]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(value) == 0 for value in metrics.values())
    assert all((p.grad == 0).all() for p in made.parameters())


def test_a_batch_moves_with_its_reference() -> None:
    there = pairs().to(torch.device("meta"))
    assert isinstance(there, PairBatch)
    assert there.reference is not None
    assert there.reference.device.type == "meta"
    assert there.without_targets().reference is not None
    assert there.count == 3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_it_is_one_graph_with_the_same_results() -> None:
    made, batch = model(), pairs()
    loss = PreferenceLoss("sigmoid", 0.1)
    torch.compiler.reset()
    compiled = torch.compile(loss, dynamic=False, backend="aot_eager", fullgraph=True)
    found = []
    for function in (loss, compiled):
        summed, metrics = function(made, batch)
        gradients = torch.autograd.grad(summed, [*made.parameters()])
        found.append([summed.detach(), *gradients, *metrics.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

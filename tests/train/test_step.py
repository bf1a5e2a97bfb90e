import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.step import (
    LossSpikeGuard,
    Step,
    TrainingDiverged,
    derive_seed,
    train_steps,
)

T, V = 12, 20
FP32 = Precision("fp32", "cpu", "")
KINDS = ["adamw", "muon"]


def small(**fields: object) -> GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, context_length=T, vocab_size=V, norm_eps=1e-6)
    return GPTModel(ModelConfig(**{**sizes, **fields}))


def samples(first: int, count: int, seed: int = 0) -> Batch:
    """Rows first..first+count-1 of an endless sequence; the share of targets differs by row."""
    rows = []
    for i in range(first, first + count):
        row = torch.randint(V, (T + 1,), generator=torch.Generator().manual_seed(seed + i))
        rows.append(row)
    ids = torch.stack(rows)
    targets = ids[:, 1:].clone()
    for n, target in enumerate(targets, first):
        target[: (5 * n) % (T + 1)] = IGNORE_INDEX  # some rows have no target at all
    return Batch(ids[:, :-1], targets, name=f"samples {first}..{first + count - 1}")


def steps(
    model: GPTModel,
    n: int,
    *,
    kind: str = "adamw",
    size: int = 4,
    optimizer: Optimizer | None = None,
    loss: Callable = next_token_loss,
    batches: Callable[[int], list[Batch]] | None = None,
    **given: object,
) -> list[Step]:
    """n steps of four rows each, in micro-batches of `size`."""
    fields = dict(learning_rate=lambda s: 0.01 * 0.98**s, precision=FP32, max_grad_norm=1.0, seed=0)
    batches = batches or (lambda s: [samples(4 * s + i, size) for i in range(0, 4, size)])
    optimizer = optimizer or Optimizer(model, OptimConfig(kind=kind), "cpu")
    run = train_steps(model, loss, batches, optimizer, **{**fields, **given})
    return list(itertools.islice(run, n))


def weights(model: GPTModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_with_unequal_targets_equal_one_batch(kind: str) -> None:
    results = []
    for size in (4, 2, 1):
        model = small()
        # One step only: where a gradient is near 0, AdamW blows rounding up to the full rate.
        done = steps(model, 1, kind=kind, size=size, max_grad_norm=0.5)[0]
        grads = [p.grad for p in model.parameters()]
        results.append((done, grads, weights(model)))
    (whole, grads, after), *split = results
    for done, other_grads, other in split:
        assert done.loss == pytest.approx(whole.loss, rel=1e-6)
        assert done.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        assert done.tokens == whole.tokens == 4 * T
        for a, b in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(after, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_is_of_the_mean_over_target_tokens() -> None:
    model, reference = small(), small()
    done = steps(model, 1, size=1, max_grad_norm=0.0)[0]
    batch = samples(0, 4)
    summed = next_token_loss(reference, batch)
    (summed / batch.count).backward()
    assert done.loss == pytest.approx(float((summed / batch.count).detach()), rel=1e-6)
    assert batch.count == sum(T - (5 * i) % (T + 1) for i in range(4))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_padding_does_not_count_as_tokens() -> None:
    micro = [
        replace(samples(0, 2), tokens=5),
        replace(samples(2, 2), tokens=0),
        samples(4, 2),  # no padding
    ]
    done = steps(small(), 2, batches=lambda s: micro)
    assert [s.tokens for s in done] == [5 + 2 * T] * 2


def test_clipping_bounds_the_gradient_and_reports_the_unclipped_norm() -> None:
    norms = {}
    for max_grad_norm in (0.0, 0.01):
        model = small()
        norms[max_grad_norm] = steps(model, 1, max_grad_norm=max_grad_norm)[0].grad_norm
        left = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert float(left) == pytest.approx(max_grad_norm or norms[0.0], rel=1e-3)
    assert norms[0.0] == norms[0.01] > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_memorised(kind: str) -> None:
    model = small(n_embd=32)
    batch = samples(1, 4)
    done = steps(model, 60, kind=kind, learning_rate=lambda s: 0.02, batches=lambda s: [batch])
    assert done[0].loss == pytest.approx(math.log(V), rel=0.05)
    assert done[-1].loss < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 4])
def test_resume_is_bit_exact(kind: str, cut: int) -> None:
    """Bit for bit, with dropout: the random numbers depend on seed, step and micro-batch alone."""
    config = OptimConfig(kind=kind)

    def run(model: GPTModel, optimizer: Optimizer, first: int, n: int) -> list[Step]:
        return steps(model, n, size=2, optimizer=optimizer, first_step=first, seed=7)

    whole = small(dropout=0.2)
    through = run(whole, Optimizer(whole, config, "cpu"), 0, 6)

    before = small(dropout=0.2)
    optimizer = Optimizer(before, config, "cpu")
    first = run(before, optimizer, 0, cut)
    state = {name: x.clone() for name, x in optimizer.state_tensors().items()}
    after = small(dropout=0.2)
    after.load_state_dict({name: x.clone() for name, x in before.state_dict().items()})
    torch.manual_seed(99)  # a new process has another state here
    resumed = Optimizer(after, config, "cpu")
    resumed.load_state_tensors(state)
    second = run(after, resumed, cut, 6 - cut)

    assert first + second == through
    assert [s.step for s in through] == [1, 2, 3, 4, 5, 6]
    assert same(weights(whole), weights(after))
    assert any("momentum" in k or "exp_avg" in k for k in state)


def test_dropout_differs_by_seed_step_and_micro_batch() -> None:
    model = small(dropout=0.5)
    batch = samples(1, 2)
    seen = []

    def loss(model: GPTModel, batch: Batch) -> Tensor:
        seen.append(torch.rand(()).item())
        return next_token_loss(model, batch)

    steps(model, 2, loss=loss, batches=lambda s: [batch, batch])
    steps(model, 1, loss=loss, batches=lambda s: [batch, batch], first_step=1)
    assert len(set(seen[:4])) == 4
    assert seen[4:] == seen[2:4]


def test_derived_seeds_are_spread_and_depend_on_every_number() -> None:
    seen = {derive_seed(a, b, c, 0) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seen) == 512
    assert all(0 <= x < 2**63 for x in seen)
    assert derive_seed(1, 2) != derive_seed(2, 1)


def broken(name: str, factor: float) -> Callable:
    """next_token_loss, but the named batch's is multiplied."""

    def loss(model: GPTModel, batch: Batch) -> Tensor:
        summed = next_token_loss(model, batch)
        return summed * factor if batch.name == name else summed

    return loss


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_is_skipped_counted_and_named(kind: str, factor: float) -> None:
    model = small()
    guard = LossSpikeGuard()
    optimizer = Optimizer(model, OptimConfig(kind=kind), "cpu")
    loss = broken("samples 10..11", factor)
    kept = []
    for step in range(4):
        before = weights(model)
        done = steps(
            model, 1, size=2, optimizer=optimizer, loss=loss, guard=guard, first_step=step
        )[0]
        kept.append(same(before, weights(model)))
        if step == 2:
            assert done.skipped.startswith("step 3 skipped: loss ")  # steps count from 1
            assert done.skipped.endswith("in samples 8..9, samples 10..11")
        else:
            assert done.skipped == ""
    assert kept == [False, False, True, False]
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(x.isfinite().all() for x in optimizer.state_tensors().values())


def test_a_loss_spike_is_skipped_and_not_added_to_recent_losses() -> None:
    model = small()
    guard = LossSpikeGuard()
    guard.recent.extend([3.0 + 0.01 * (i % 2) for i in range(64)])
    before = weights(model)
    done = steps(model, 2, loss=broken("samples 0..3", 3.0), guard=guard)
    assert "jumped from 3.005 in samples 0..3" in done[0].skipped
    assert done[1].skipped == ""
    assert max(guard.recent) < 4
    assert not same(before, weights(model))


def test_ordinary_losses_are_not_spikes() -> None:
    quiet, noisy = LossSpikeGuard(), LossSpikeGuard(sigmas=4)
    for i in range(64):
        assert quiet.check(i, 50.0, 1.0, lambda: ["a"]) == ""  # nothing to compare with yet
        assert noisy.check(i, 3.0 + (i % 2), 1.0, lambda: ["a"]) == ""
    assert quiet.check(64, 50.9, 1.0, lambda: ["a"]) == ""  # many deviations, but under a nat
    assert "jumped" in quiet.check(65, 51.2, 1.0, lambda: ["a"])
    assert noisy.check(64, 5.4, 1.0, lambda: ["a"]) == ""
    assert "jumped" in noisy.check(65, 6.0, 1.0, lambda: ["a"])
    never = LossSpikeGuard(sigmas=0)
    never.recent.extend([1.0] * 64)
    assert never.check(0, 1e9, 1.0, lambda: ["a"]) == ""


def test_too_many_skipped_steps_in_a_row_stop_training() -> None:
    guard = LossSpikeGuard(patience=3)
    with pytest.raises(
        TrainingDiverged, match=r"step 4 skipped: .*samples 12\.\.15; 3 steps in a row"
    ):
        steps(small(), 9, loss=lambda m, b: torch.nan * next_token_loss(m, b),
              first_step=1, guard=guard)  # fmt: skip
    guard = LossSpikeGuard(patience=2)
    for i in range(8):  # never two in a row
        guard.check(i, math.nan if i % 2 else 1.0, 1.0, lambda: ["a"])
    assert guard.skipped == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_diverged_run_can_be_saved_and_resumed(kind: str) -> None:
    bad = {f"samples {4 * s}..{4 * s + 3}" for s in (3, 4, 5)}

    def loss(model: GPTModel, batch: Batch) -> Tensor:
        summed = next_token_loss(model, batch)
        return summed * torch.nan if batch.name in bad else summed

    config = OptimConfig(kind=kind)
    patient, guard = small(), LossSpikeGuard(patience=4)
    through = steps(
        patient, 8, optimizer=(first := Optimizer(patient, config, "cpu")), loss=loss, guard=guard
    )
    assert [bool(s.skipped) for s in through] == [False] * 3 + [True] * 3 + [False] * 2

    model, hasty = small(), LossSpikeGuard(patience=3)
    optimizer = Optimizer(model, config, "cpu")
    seen: list[Step] = []
    stood = []

    def batches(step: int) -> list[Batch]:  # asked for before anything of the step happens
        state = {name: x.clone() for name, x in optimizer.state_tensors().items()}
        stood.append((weights(model), state, hasty.state()))
        return [samples(4 * step, 4)]

    rate = dict(learning_rate=lambda s: 0.01 * 0.98**s, precision=FP32, max_grad_norm=1.0, seed=0)
    run = train_steps(model, loss, batches, optimizer, guard=hasty, **rate)
    with pytest.raises(TrainingDiverged, match=r"step 6 skipped: .* 3 steps in a row"):
        seen.extend(run)
    *_, good, _, last = stood  # before steps 4, 5 and 6
    assert [str(s) for s in seen] == [str(s) for s in through[:5]]  # NaN equals nothing
    assert same(weights(model), good[0])
    now = optimizer.state_tensors()
    assert now.keys() == good[1].keys()
    assert all(torch.equal(x, now[name]) for name, x in good[1].items())
    assert hasty.state() == last[2]

    resumed = LossSpikeGuard(patience=4)
    resumed.load(hasty.state())
    rest = steps(model, 3, optimizer=optimizer, loss=loss, guard=resumed, first_step=5)
    assert [str(s) for s in rest] == [str(s) for s in through[5:]]
    assert same(weights(patient), weights(model))
    assert resumed.state() == guard.state()
    states = (first.state_tensors(), optimizer.state_tensors())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_guard_state_survives_a_resume() -> None:
    guard = LossSpikeGuard(patience=3)
    for i in range(70):
        guard.check(i, float(i % 3), 1.0, lambda: ["a"])
    guard.check(70, math.nan, 1.0, lambda: ["a"])
    other = LossSpikeGuard(patience=3)
    other.load(guard.state())
    assert other.state() == guard.state()
    assert len(other.recent) == 64
    other.check(71, math.nan, 1.0, lambda: ["a"])
    with pytest.raises(TrainingDiverged):
        other.check(72, math.nan, 1.0, lambda: ["a"])


def test_loss_scaler_survives_overflow_and_changes_nothing_else() -> None:
    model, plain = small(), small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = steps(model, 3, scaler=scaler)
    for a, b in zip(scaled, steps(plain, 3), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    guard = LossSpikeGuard(patience=1)
    before = weights(model)

    def steep(model: GPTModel, batch: Batch) -> Tensor:  # any gradient above 2 overflows
        return 100 * next_token_loss(model, batch)

    done = steps(model, 1, scaler=scaler, guard=guard, loss=steep)[0]
    assert "fp16 overflow at loss scale 1.7" in done.skipped
    assert same(before, weights(model))
    assert (guard.skipped, scaler.get_scale()) == (0, 2.0**67)
    assert steps(model, 1, scaler=scaler, guard=guard)[0].skipped == ""


def test_overflow_at_scale_one_counts_as_divergence() -> None:
    def infinite_gradient(model: GPTModel, batch: Batch) -> Tensor:
        summed = next_token_loss(model, batch)
        summed.register_hook(lambda g: g * torch.inf)
        return summed

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(
        TrainingDiverged, match=r"step 5 .* gradient norm nan in .*; 2 steps in a row"
    ):
        steps(small(), 9, loss=infinite_gradient, scaler=scaler, guard=LossSpikeGuard(patience=2))


def test_a_step_without_targets_has_zero_gradient() -> None:
    model = small()
    ids = torch.randint(V, (2, T))
    batch = Batch(ids, torch.full_like(ids, IGNORE_INDEX))
    done = steps(model, 1, batches=lambda s: [batch])[0]
    assert (done.loss, done.grad_norm, done.skipped) == (0.0, 0.0, "")


def test_model_is_in_training_mode_and_uses_the_scheduled_rate() -> None:
    model = small()
    rates = []

    def loss(model: GPTModel, batch: Batch) -> Tensor:
        assert model.training
        return next_token_loss(model, batch)

    optimizer = Optimizer(model, OptimConfig(), "cpu")
    for step in range(3):
        model.eval()  # as an evaluation between steps leaves it
        fields = dict(first_step=step, learning_rate=lambda s: 0.5**s)
        rates.append(steps(model, 1, loss=loss, optimizer=optimizer, **fields)[0].learning_rate)
    assert rates == [1.0, 0.5, 0.25]
    assert {g["lr"] for o in optimizer.optimizers for g in o.param_groups} == {0.25}


# --- metrics -------------------------------------------------------------------------------------


def measured_loss(model: GPTModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = next_token_loss(model, batch)
    targets = batch.targets[batch.targets != IGNORE_INDEX]
    return loss, {"ids": targets.sum().float(), "again": loss}


@pytest.mark.parametrize("size", [4, 1])
def test_metrics_of_the_loss_are_means_over_the_step(size: int) -> None:
    plain, measured = small(), small()
    expected = steps(plain, 3, size=size)
    for number, done in enumerate(steps(measured, 3, size=size, loss=measured_loss)):
        batch = samples(4 * number, 4)
        targets = batch.targets[batch.targets != IGNORE_INDEX]
        assert done.metrics["ids"] == pytest.approx(float(targets.float().mean()), rel=1e-6)
        assert done.metrics["again"] == pytest.approx(done.loss, rel=1e-6)
        assert done.loss == expected[number].loss
        assert expected[number].metrics == {}
    assert same(weights(plain), weights(measured))

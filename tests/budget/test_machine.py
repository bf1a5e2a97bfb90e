"""Measured machines. No test depends on how fast this one is."""

import mmap
from dataclasses import replace

import pytest
import torch

from gptsmith.budget import machine, rules
from gptsmith.budget.machine import Machine, MeasuredStep
from gptsmith.budget.step_time import Cluster
from gptsmith.model.config import ModelConfig

BOX = Machine("box", "cpu", Cluster(peak=1e12, memory=50e9), memory=2**34)


@pytest.mark.parametrize("seconds", [0.02, 0.3, 4.0])
def test_the_estimate_for_a_measured_step_is_its_time(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr(machine, "measure_step", lambda *_, **__: MeasuredStep(seconds, 9.0))
    design = rules.design(3, 257, 5e6)
    assert BOX.measured(design).step_seconds(design) == pytest.approx(seconds, rel=1e-6)


def test_shares_are_interpolated_by_depth() -> None:
    here = replace(BOX, shares={2: 0.2, 4: 0.4})
    shares = [here.share(rules.shape(depth, 257)) for depth in (1, 2, 3, 4, 9)]
    assert shares == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.4])


def test_compiled_steps_make_all_depths_faster_and_the_start_longer(monkeypatch) -> None:
    here = replace(BOX, shares={2: 0.1, 3: 0.2}, startup=5.0)
    design = rules.design(3, 257, 5e6)
    eager = here.step_seconds(design)
    monkeypatch.setattr(
        machine, "measure_step", lambda *_, **__: MeasuredStep(0.8 * eager, 30 + 0.8 * eager)
    )
    compiled = here.compiled(design)
    assert compiled.step_seconds(design) == pytest.approx(0.8 * eager)
    assert compiled.shares[2] / here.shares[2] == compiled.shares[3] / here.shares[3] > 1
    assert compiled.startup == pytest.approx(35.0)


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_a_time_ends_when_the_device_has_computed(monkeypatch, kind: str) -> None:
    """Operations on an accelerator are only queued: it is waited for before and after each."""
    order: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", order.append)
    device = torch.device(kind)
    assert machine._best(2, lambda: order.append("work"), device) >= 0
    waited = [] if kind == "cpu" else [device]
    assert order == 2 * [*waited, "work", *waited]


def test_this_machine_computes() -> None:
    """Real products, copies and steps."""
    here = machine.this_machine(started=0.0)
    assert here.cluster.peak > 1e8
    assert here.cluster.memory > 1e8
    assert here.memory is None or here.memory > 2**28
    model = ModelConfig(n_layer=1, n_head=1, n_embd=16, context_length=8, vocab_size=11)
    step = machine.measure_step(model, 2, micro_batches=3, steps=2)
    assert 0 < step.seconds
    assert step.first > 0


def test_resident_memory_grows_with_what_is_allocated() -> None:
    before = machine.resident_bytes()
    with mmap.mmap(-1, 2**26) as kept:  # not of the heap, which may have been freed before
        for page in range(0, len(kept), mmap.PAGESIZE):
            kept[page] = 1
        assert machine.resident_bytes() - before > 0.9 * len(kept)

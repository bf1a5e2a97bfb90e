"""What a run says at its start about this machine and its data."""

import pytest
import torch
from ranks import Rows

from gptsmith.batch import Batch
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import TrainingMemory, flops_per_token
from gptsmith.recipes import plan
from gptsmith.recipes.options import PretrainConfig, RecipeConfig, SaveConfig, TrainConfig


class Packed(Rows):
    def batch(self, first: int, count: int) -> Batch:
        batch = super().batch(first, count)
        return Batch(batch.inputs, batch.targets, documents=torch.zeros_like(batch.inputs))


@pytest.mark.parametrize(
    ("rows", "axes", "device", "slow"),
    [
        (Packed, dict(dropout=0.1), "cuda", True),
        (Rows, dict(dropout=0.1, mask="causal() & sliding_window(8)"), "cuda", True),
        (Rows, dict(dropout=0.1), "cuda", False),
        (Packed, {}, "cuda", False),
        (Packed, dict(dropout=0.1), "cpu", False),
    ],
)
def test_slow_dropout_under_a_mask_is_named(rows, axes, device, slow) -> None:
    model = ModelConfig.preset("nano").change(**axes)
    notes = plan._mask_notes(model, rows(), torch.device(device))
    assert bool(notes) == slow
    if slow:
        assert "with model.dropout 0.1, attention takes a dense mask" in notes[0].text


@pytest.mark.parametrize(
    ("device", "ranks", "limit"),  # the last of the CPU's GiB with which training waits
    [("cpu", 1, 10), ("cpu", 4, 28.75), ("cuda", 1, 7.5), ("cuda", 4, 7.5)],
)
def test_memory_for_saves_in_the_background(monkeypatch, device, ranks, limit) -> None:
    """A copy of 3 GiB, which may take 6 of pinned memory, and 5 GiB to train on each rank's CPU."""
    monkeypatch.setattr(plan.distributed, "world_size", lambda: ranks)
    config = RecipeConfig.model_construct(save=SaveConfig())
    memory = TrainingMemory(weights=2**30, gradients=2**30, optimizer=2**31, activations=2**30)

    def notes(gib: float) -> list[plan.Note]:
        monkeypatch.setattr(plan.runtime, "memory_bytes", lambda device: int(gib * 2**30))
        return plan._saving_notes(config, memory, torch.device(device), 1)

    (note,) = notes(limit * 0.98)
    takes = "up to 6.0" if device == "cuda" else "3.0"
    assert f"takes {takes} GiB more of the CPU's" in note.text
    assert notes(limit * 1.02) == []


def test_steps_of_more_rows_than_there_are_are_named() -> None:
    (note,) = plan._repetition_notes(32, 5)
    assert "a step of 32 rows uses the 5 rows of the data 6.4 times: a smaller" in note.text
    assert "uses the 1 row of" in plan._repetition_notes(32, 1)[0].text
    assert plan._repetition_notes(32, 32) == []


def test_the_work_of_a_run_is_that_of_its_rows(tmp_path, monkeypatch) -> None:
    """They may be shorter than the model's context."""
    found = []

    def choose(mode: str, device: torch.device, flops: float, seconds: float | None) -> object:
        found.append(flops)
        return False, "as configured"

    monkeypatch.setattr(plan.runtime, "choose_compile", choose)
    train = TrainConfig(steps=10, batch_size=2, device="cpu")
    config = PretrainConfig(data=tmp_path, out=tmp_path / "run", train=train)
    model = ModelConfig.preset("nano")
    plan.resolve(config, model, Rows())
    assert Rows.T < model.context_length
    assert found == [flops_per_token(model, Rows.T) * 10 * 2 * Rows.T]


def test_a_short_pass_over_the_corpus_is_named() -> None:
    config = PretrainConfig.model_construct(train=TrainConfig())
    (note,) = plan._length_notes(config, 99)
    assert "the default, is 99 steps, in which a model learns little" in note.text
    assert "is 1 step, in" in plan._length_notes(config, 1)[0].text
    assert plan._length_notes(config, 100) == []
    chosen = config.model_copy(update=dict(train=TrainConfig(steps=99)))
    assert plan._length_notes(chosen, 99) == []

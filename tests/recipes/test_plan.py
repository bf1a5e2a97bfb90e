"""What a run says at its start about this machine and its data."""

import pytest
import torch
from ranks import Rows

from gptsmith.batch import Batch
from gptsmith.model.config import ModelConfig
from gptsmith.recipes import plan


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

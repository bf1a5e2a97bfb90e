import torch

from gptsmith.batch import IGNORE_INDEX, Batch


def test_count_is_the_number_of_targets_and_tokens_that_of_inputs() -> None:
    targets = torch.tensor([[1, IGNORE_INDEX, 3], [IGNORE_INDEX] * 3])
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), targets)
    assert (batch.count, batch.tokens) == (2, 6)


def test_counts_that_the_data_gives_are_kept_on_every_device() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    moved = Batch(ids, ids, documents=ids, count=1, tokens=4).to(torch.device("meta"))
    assert (moved.count, moved.tokens) == (1, 4)
    assert moved.inputs.device.type == moved.targets.device.type == "meta"
    assert moved.documents is not None
    assert moved.documents.device.type == "meta"
    assert moved.positions is None

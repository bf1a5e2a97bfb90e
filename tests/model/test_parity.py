"""Our network computes what the classes of transformers compute: values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.train.loss import next_token_loss

B, T, V = 3, 20, 97

CASES = [
    "gpt2", "llama", "llama tied, equal heads", "llama biased", "llama linear", "llama3", "qwen3",
    "qwen2", "arcee",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(
    case: str, stock: Callable[..., Any]
) -> None:
    pair = stock(case)
    theirs, ours = pair.theirs, pair.ours
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, :7] = IGNORE_INDEX
    expected = theirs(inputs).logits
    logits = ours(inputs)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    batch = Batch(inputs, targets)
    summed = next_token_loss(ours, batch)
    (summed / batch.count).backward()
    torch.testing.assert_close(summed / batch.count, loss, rtol=1e-6, atol=1e-6)
    grads = pair.move({n: p.grad for n, p in theirs.named_parameters()}, 2)
    for name, p in ours.named_parameters():
        assert grads[name].abs().max() > 1e-4, name
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)

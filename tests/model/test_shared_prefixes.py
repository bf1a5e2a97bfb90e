"""Rows that begin alike, computed once: the same vectors, losses and gradients as separate rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_weights import add_noise
from torch import Tensor

from gptsmith.data.same_prefixes import same_prefixes
from gptsmith.model import masks
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import attach
from gptsmith.model.masks import Mask

pytestmark = pytest.mark.usefixtures("one_thread")

T, V = 12, 30
PROMPT, OTHER = [1, 2, 3, 4], [1, 2, 9]
ROWS = [
    [*PROMPT, 5, 6], [*PROMPT, 7, 8, 9, 10, 11], [*OTHER, 5, 6], [*PROMPT, 7, 8, 3],
    [20, 21, 22], [*PROMPT, 5, 6], PROMPT,
]  # fmt: skip
LENGTHS = np.array([len(row) for row in ROWS])
IDS = torch.tensor([[*row, *[0] * (T - len(row))] for row in ROWS])
IS_TOKEN = torch.arange(T) < torch.from_numpy(LENGTHS)[:, None]
DIFFERENT = len({tuple(row[: t + 1]) for row in ROWS for t in range(len(row))})


def shared() -> Tensor:
    found = same_prefixes(IDS.numpy(), LENGTHS)
    assert found is not None
    return found


def tiny(**fields: Any) -> GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, context_length=T, vocab_size=V)
    model = GPTModel(ModelConfig(**{**sizes, **fields}))
    add_noise(model, 0.2)
    return model


def vectors_and_gradients(model: GPTModel, run: Callable[[], Tensor]) -> list[Tensor]:
    """Of the tokens; a gradient that is different at each."""
    model.zero_grad()
    x = run()[IS_TOKEN]
    (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [x.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4),
    "qk_norm": dict(qk_norm=True),
    "window": dict(mask="causal() & sliding_window(3)"),
    "complement": dict(mask="causal() & ~prefix(2)"),
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_and_gradients_are_those_of_separate_rows(case: str) -> None:
    model, same_as = tiny(**CASES[case]), shared()
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, args, y: seen.append(y[..., 0].numel()))
    expected = vectors_and_gradients(model, lambda: model.hidden(IDS))
    found = vectors_and_gradients(model, lambda: model.hidden(IDS, same_as=same_as))
    assert_equal(found, expected)
    assert len(found) == 1 + len([*model.parameters()])
    assert seen == [IDS.numel(), -(-DIFFERENT // 16) * 16]


def test_adapters_get_the_same_gradients() -> None:
    model, same_as = tiny(), shared()
    attach(model, LoraConfig(rank=2))
    add_noise(model, 0.2)
    expected = vectors_and_gradients(model, lambda: model.hidden(IDS))
    found = vectors_and_gradients(model, lambda: model.hidden(IDS, same_as=same_as))
    assert_equal(found, expected)


def test_with_activation_checkpointing_nothing_changes() -> None:
    model, same_as = tiny(), shared()
    found = []
    for model.activation_checkpointing in (False, True):
        found.append(vectors_and_gradients(model, lambda: model.hidden(IDS, same_as=same_as)))
    assert all(map(torch.equal, *found))


def test_in_bf16_the_gradients_of_many_copies_are_added_up_in_fp32() -> None:
    """300 answers to a prompt: added up in bf16, their gradients would stop growing at 256."""
    ids = torch.tensor([[1, 2, 3 + i % 20, i // 20] for i in range(300)])
    same_as = same_prefixes(ids.numpy(), np.full(300, 4))
    model = tiny()

    def gradient(**arguments: Any) -> Tensor:
        model.zero_grad()
        model.hidden(ids, **arguments)[:, 2:].sum().backward()
        found = model.embedding.token.weight.grad
        assert found is not None
        return found[1]

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradient(same_as=same_as)
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


def test_a_mask_for_a_single_pass_is_obeyed() -> None:
    model, mask = tiny(), masks.causal() & masks.sliding_window(2)
    a, b = (model.hidden(IDS, mask=mask, same_as=s)[IS_TOKEN] for s in (shared(), None))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        masks.prefix(3),
        masks.bidirectional(),
        Mask(lambda b, h, q, k: q >= k),  # which the rule does not tell
        masks.causal() & masks.documents(torch.zeros(len(ROWS), T, dtype=torch.int64)),
    ],
    ids=["prefix", "bidirectional", "function", "by row"],
)
def test_a_mask_under_which_equal_tokens_may_differ_is_refused(mask: Mask) -> None:
    with pytest.raises(ValueError, match="cannot be computed as one"):
        tiny().hidden(IDS, mask=mask, same_as=shared())


def test_what_does_not_fit_is_refused() -> None:
    model, same_as = tiny(), shared()
    with pytest.raises(ValueError, match=r"same_as is torch\.int64 of shape"):
        model.hidden(IDS, same_as=same_as[1:])
    with pytest.raises(ValueError, match="same_as has 84: give 0 to 83"):
        model.hidden(IDS, same_as=torch.where(same_as < 0, 84, same_as))
    with pytest.raises(ValueError, match="goes with a Mask alone"):
        model.hidden(IDS, same_as=same_as, positions=torch.arange(T))
    long = IDS.repeat(1, 2)
    with pytest.raises(ValueError, match=r"24 tokens .* context_length 12"):
        model.hidden(long, same_as=torch.zeros_like(long))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import add_noise
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.masks import Mask, bidirectional, causal, prefix, sliding_window
from gptsmith.model.target_leakage import first_target

T, H = 8, 2


@pytest.mark.parametrize("mask", [causal(), causal() & sliding_window(3), causal() & prefix(4)])
def test_causal_masks_leak_no_target(mask: Mask) -> None:
    assert first_target(mask, T, H, n_layer=12) == 0
    assert first_target(mask, 1, H, n_layer=12) == 0


@pytest.mark.parametrize(("n", "first"), [(0, 0), (1, 0), (2, 1), (5, 4), (7, 6)])
def test_prefix_targets_count_from_its_last_position(n: int, first: int) -> None:
    for n_layer in (1, 2, 12):
        assert first_target(prefix(n), T, H, n_layer) == first


@pytest.mark.parametrize("mask", [bidirectional(), prefix(T), prefix(2 * T), sliding_window(3)])
def test_masks_that_show_all_targets_are_rejected(mask: Mask) -> None:
    with pytest.raises(ValueError, match=r"position 0 can see token 1, .* prefix\(n\)"):
        first_target(mask, T, H, n_layer=1)


def test_one_head_that_looks_ahead_is_enough() -> None:
    def one_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | ((h == 1) & (q == 4) & (k == 5))

    with pytest.raises(ValueError, match=r"one_head.*position 4 can see token 5"):
        first_target(Mask(one_head), T, H, n_layer=1)


def test_a_target_seen_through_another_position_is_found_at_the_depth_that_carries_it() -> None:
    def hop(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | ((q == 3) & (k == 6))  # 3 sees 6, which has seen 4 (3's target)

    assert first_target(Mask(hop), T, H, n_layer=1) == 0
    with pytest.raises(ValueError, match="position 3 can see token 4"):
        first_target(Mask(hop), T, H, n_layer=2)

    def first_sees_fifth(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | ((q == 0) & (k == 5))  # 4 sees 0, which has seen 5 (4's target)

    assert first_target(Mask(first_sees_fifth), T, H, n_layer=1) == 0
    # 0 -> 5 -> 1 and 4 -> 0 -> 5 after two layers, 2 -> 0 -> 5 -> 3 after three: then a prefix.
    with pytest.raises(ValueError, match="position 4 can see token 5"):
        first_target(Mask(first_sees_fifth), T, H, n_layer=2)
    assert first_target(Mask(first_sees_fifth), T, H, n_layer=3) == 5


def test_memory_is_not_quadratic_in_the_context() -> None:
    T = 8192
    assert first_target(prefix(100), T, H, n_layer=28) == 99
    assert first_target(prefix(T - 1), T, H, n_layer=28) == T - 2
    with pytest.raises(ValueError, match="position 0 can see token 1"):
        first_target(bidirectional(), T, H, n_layer=28)

    def blocks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | (q // 64 == k // 64)

    with pytest.raises(ValueError, match=r"blocks.*looks ahead over 8192 .* shorter context"):
        first_target(Mask(blocks), T, H, n_layer=28)
    with pytest.raises(ValueError, match="position 64 can see token 65"):
        first_target(Mask(blocks), 256, H, n_layer=28)


@given(st.lists(st.booleans(), min_size=36, max_size=36), st.integers(1, 3))
@settings(max_examples=25)
def test_leakage_agrees_with_a_real_model(bits: list[bool], n_layer: int) -> None:
    """The target's embedding has a gradient at a position's output exactly where it is reached."""
    n = 6
    table = torch.tensor(bits).view(n, n) & (torch.rand(n, n, generator=_seeded()) < 0.3)
    table |= torch.ones(n, n).tril().bool()

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table[q, k]

    torch.manual_seed(0)
    c = ModelConfig(n_layer=n_layer, n_head=2, n_embd=8, context_length=n, vocab_size=n, mlp="gelu")
    model = GPTModel(c).double()
    add_noise(model, 0.3)
    x = torch.randn(1, n, 8, dtype=torch.double, requires_grad=True)
    model.embedding.forward = lambda ids, positions: x  # type: ignore[method-assign]
    hidden = model.hidden(torch.zeros(1, n, dtype=torch.long), mask=Mask(rule))
    leaks = [
        bool(
            (torch.autograd.grad(hidden[0, t].sum(), x, retain_graph=True)[0][0, t + 1] != 0).any()
        )
        for t in range(n - 1)
    ]
    first = leaks.index(False) if False in leaks else n
    if first == n or any(leaks[first:]):
        with pytest.raises(ValueError, match="can see token"):
            first_target(Mask(rule), n, 2, n_layer)
    else:
        assert first_target(Mask(rule), n, 2, n_layer) == first


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)

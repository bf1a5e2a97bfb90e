"""Comparisons whose failure names what differs, and where first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Mismatch(Exception):
    """A property that does not hold, in one line."""


def holds(condition: object, otherwise: str) -> None:
    if not condition:
        raise Mismatch(otherwise)


def same(actual: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """Mismatch naming the first index where two tensors differ; numbers are compared as well.

    tolerance: absolute, and relative to the largest expected number. Integers must be equal.
    """
    expected = torch.as_tensor(expected)
    holds(
        isinstance(actual, Tensor | int | float | list),
        f"{what} is {describe(actual)}, a tensor is expected",
    )
    actual = torch.as_tensor(actual)
    holds(
        actual.shape == expected.shape,
        f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}",
    )
    is_exact = not expected.is_floating_point()
    holds(
        actual.is_floating_point() != is_exact,
        f"{what} has dtype {actual.dtype}, expected {expected.dtype}",
    )
    a, b = actual.detach().double(), expected.detach().double()
    limit = 0.0 if is_exact or not b.numel() else tolerance * max(1.0, float(b.abs().max()))
    wrong = ~((a - b).abs() <= limit)  # also true for NaN
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        at = f"[{', '.join(map(str, index))}]" if index else ""
        count = f", {int(wrong.sum())} of {wrong.numel()} numbers differ" if index else ""
        raise Mismatch(f"{what}{at} is {a[index]:.6g}, expected {b[index]:.6g}{count}")


def describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def same_parameters(module: nn.Module, reference: nn.Module) -> None:
    """Mismatch naming the first parameter that is missing, too much, or has another shape."""
    found = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    expected = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    for name, shape in expected.items():
        holds(name in found, f"there is no parameter {name} {shape}; yours: {', '.join(found)}")
        holds(found[name] == shape, f"{name} has shape {found[name]}, expected {shape}")
    for name in found:
        holds(name in expected, f"there is a parameter {name} {found[name]}, which is not needed")


def same_function(module: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    """Mismatch if outputs, or gradients of a random projection of them, differ from those of the
    reference with the same weights."""
    reference.load_state_dict(module.state_dict(), strict=False)  # a buffer of yours has no place
    reference.train(module.training)
    results: list[tuple[Tensor, dict[str, Tensor | None]]] = []
    for each in (module, reference):
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        output = each(*given)
        holds(isinstance(output, Tensor), f"the output is {describe(output)}, not a tensor")
        names = dict(each.named_parameters())
        names.update(("the input", x) for x in given if x.requires_grad)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        found = torch.autograd.grad(
            (output * weight).sum(), list(names.values()), allow_unused=True
        )
        results.append((output, dict(zip(names, found, strict=True))))
    (output, gradients), (expected, expected_gradients) = results
    same(output, expected, "the output")
    for name, gradient in expected_gradients.items():
        assert gradient is not None
        holds(gradients[name] is not None, f"{name} gets no gradient")
        same(gradients[name], gradient, f"the gradient of {name}")


def changes_from(before: Tensor, after: Tensor) -> list[int]:
    """The positions, dimension 1, where (B, T, ...) tensors differ noticeably."""
    changed = (before - after).abs() > 1e-6 * max(1.0, float(before.detach().abs().max()))
    other = [d for d in range(changed.dim()) if d != 1]
    return changed.any(dim=other).nonzero().flatten().tolist() if other else []


def causal(before: Tensor, after: Tensor, changed: int) -> None:
    """Mismatch if outputs (B, T, ...) before position `changed` depend on the input there."""
    early = [t for t in changes_from(before, after) if t < changed]
    holds(not early, f"the output at position {early and early[0]} changes with position {changed}")


def covered_once(found: Sequence[int], expected: Sequence[int], what: str) -> None:
    """Mismatch naming the first number that is missing from `found`, or there more than once."""
    for number in expected:
        count = list(found).count(number)
        holds(count == 1, f"{what} {number} is there {count} times, expected once")
    holds(len(found) == len(expected), f"there are {len(found)} {what}s, expected {len(expected)}")

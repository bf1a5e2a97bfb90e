"""Packed weights: products against torch's, and what quantization costs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.kernels import native
from gptsmith.kernels.packed_matrix import Memory, PackedMatrix


def pack(weight: Tensor, format: str, bias: Tensor | None = None) -> PackedMatrix:
    library = native.kernels(format)
    assert library is not None
    return PackedMatrix(library, Memory(), weight, bias, format)


@given(
    st.sampled_from(native.FORMATS), st.integers(1, 200), st.integers(1, 300), st.integers(1, 13)
)
def test_each_row_of_a_product_has_its_bits_in_any_batch(
    format: str, outputs: int, inputs: int, rows: int
) -> None:
    torch.manual_seed(outputs * 300 + inputs)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    matrix = pack(weight, format, bias)
    y = matrix.product(x)
    assert torch.equal(y, torch.cat([matrix.product(row[None]) for row in x]))
    error = y - F.linear(x, weight, bias)
    bound = {"float32": 1e-6, "bfloat16": 6e-3, "int8": 2e-2, "int4": 0.25}[format]
    size = weight.abs() @ x.abs().T  # (outputs, rows): of the sums that are rounded
    assert (error.abs() <= bound * (size.T + bias.abs()) + 1e-6).all()


# Root mean square error of normal weights, in their standard deviation. int8: steps of
# largest / 127 with the largest of 64 about 2.5: 2.5 / 127 / sqrt(12) = 0.0057.
@pytest.mark.parametrize(("format", "bound"), [("int8", 0.006), ("int4", 0.09)])
def test_quantized_weights_are_near(format: str, bound: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(256, 512)
    assert (pack(w, format).weight() - w).square().mean().sqrt() < bound


def test_the_largest_weight_of_a_group_of_int4_is_kept() -> None:
    """Up to the rounding of the scale."""
    torch.manual_seed(0)
    w = torch.randn(64, 512)
    groups, kept = w.view(-1, 32), pack(w, "int4").weight().reshape(-1, 32)
    at = groups.abs().argmax(dim=1, keepdim=True)
    largest = groups.gather(1, at)
    assert ((kept.gather(1, at) / largest - 1).abs() <= 2**-8).all()
    step = largest.abs() / 8
    assert ((kept - groups).abs() <= 1.01 * step).all()  # those of the other sign end at 7 steps
    assert ((kept - groups).abs() <= 0.52 * step).float().mean() > 0.98


@pytest.mark.parametrize("format", native.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_are_packed(format: str, dtype: torch.dtype) -> None:
    w = torch.linspace(-1, 1, 70 * 33).view(70, 33).to(dtype)
    weight = pack(w.T, format).weight()
    assert torch.equal(weight, pack(w.float().T, format).weight())
    if format == "float32":
        assert torch.equal(weight, w.float().T)
    if format == "bfloat16":
        assert torch.equal(weight, w.bfloat16().float().T)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_group_of_zeros_and_one_of_huge_weights_are_kept(format: str) -> None:
    w = torch.zeros(2, 128)
    w[1] = 1e30
    y = pack(w, format).product(torch.eye(128)[:3])
    assert torch.equal(y[:, 0], torch.zeros(3))
    assert ((y[:, 1] - 1e30).abs() < 2e28).all()


def test_sizes_of_formats() -> None:
    bits = {f: pack(torch.zeros(64, 1024), f).nbytes / 8192 for f in native.FORMATS}
    assert bits == {"float32": 32, "bfloat16": 16, "int8": 8.25, "int4": 4.5}

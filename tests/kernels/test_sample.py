"""The kernel that chooses tokens, by the definition in generate/sampling.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptsmith.generate import sampling
from gptsmith.generate.forward import KernelForward
from gptsmith.generate.options import SamplingConfig
from gptsmith.kernels.packed_model import PackedModel, library_for
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

SETTINGS = [
    SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.0, 0.7, 1.5)
    for top_k in (None, 1, 40)
    for top_p in (None, 0.3, 0.9)
    for min_p in (None, 0.05)
]


@pytest.fixture(scope="module")
def forward() -> KernelForward:
    model = GPTModel(ModelConfig.preset("nano", vocab_size=8))
    if library_for(model) is None:
        pytest.skip("no compiled kernels on this machine")
    return KernelForward(PackedModel(model))


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 64, 65, 127, 200, 1000])
def test_tokens_are_those_of_the_definition_for_every_number_of_logits(
    forward: KernelForward, threads: int, V: int
) -> None:
    """Vectors have up to 16 numbers, blocks 64. A single row is memory of its own, so that a
    sanitizer sees what is read beside it."""
    generator = torch.Generator().manual_seed(V)
    n = len(SETTINGS)
    logits = 3 * torch.randn(n, V + 5, generator=generator)[:, :V]  # as of a padded vocabulary
    points = torch.rand(n, dtype=torch.double, generator=generator).tolist()
    expected = sampling.sample(logits.double(), SETTINGS, points)
    assert forward.sample(logits, range(n), SETTINGS, points) == expected
    some = [n - 1, 3, 7]
    found = forward.sample(logits, some, [SETTINGS[i] for i in some], [points[i] for i in some])
    assert found == [expected[i] for i in some]
    for i, config in enumerate(SETTINGS):
        assert forward.sample(logits[i, None].clone(), [0], [config], [points[i]]) == [expected[i]]


@pytest.mark.parametrize("V", [1, 17, 64, 65, 200])
def test_tied_and_excluded_logits_up_to_the_last(
    forward: KernelForward, threads: int, V: int
) -> None:
    def chosen(rows: list[Tensor], config: SamplingConfig, point: float) -> list[int]:
        n = len(rows)
        return forward.sample(torch.stack(rows), range(n), [config] * n, [point] * n)

    flat, last = torch.zeros(V), torch.full((V,), -torch.inf)
    last[-1] = 0
    rows, most = [flat, last] * 2, 1 - 2.0**-53
    assert chosen(rows, SamplingConfig(temperature=0), 0.5) == [0, V - 1] * 2
    assert chosen(rows, SamplingConfig(), most) == [V - 1] * 4
    assert chosen(rows, SamplingConfig(top_k=V), most) == [V - 1] * 4
    assert chosen(rows, SamplingConfig(top_k=1), most) == [0, V - 1] * 2
    for bad in (torch.nan, torch.inf):
        for at in {0, V - 1}:
            damaged = flat.clone()
            damaged[at] = bad
            with pytest.raises(ValueError, match=f"logits reach {bad}: its weights are damaged"):
                chosen([flat, damaged], SamplingConfig(), 0.5)

import shutil

import pytest
import torch

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import compiling
from gptsmith.train.compiling import decide
from gptsmith.train.loss import Batch, next_token_loss

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("compiler")
def test_it_is_compiled_when_the_run_is_long_enough_to_pay() -> None:
    per_second = 60e9 * torch.get_num_threads()
    for flops, seconds, on in (
        (per_second * 30, None, False),
        (per_second * 3000, None, True),
        (per_second * 3000, 85.0, False),  # the clock says more than the FLOPs
        (per_second * 30, 3600.0, True),
    ):
        chosen, why = decide("auto", CPU, flops, seconds)
        assert chosen is on
        assert "s of work" in why
    assert decide("auto", MPS, 1e30, None)[0] is False
    assert decide("on", CPU, 1.0, None) == (True, "asked for")
    assert decide("off", CUDA, 1e30, None) == (False, "asked for")


@pytest.mark.usefixtures("no_compiler")
def test_without_a_c_compiler_a_cpu_does_not_compile() -> None:
    assert decide("auto", CPU, 1e30, None) == (
        False,
        "no C++ compiler (g++; on a GPU also triton) here",
    )
    assert decide("off", CPU, 1e30, None)[0] is False
    assert decide("auto", CUDA, 1e30, None)[0] is False
    for device in (CPU, CUDA):
        with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* or say auto"):
            decide("on", device, 1.0, None)


# torch makes such an object itself when it traces one of ours
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["tiny", "fast"])
def test_the_loss_is_one_graph_with_the_same_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, differentiated and run as a graph, without the minute of making machine code."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: real(f, backend="aot_eager", fullgraph=True, **given)
    )
    torch.manual_seed(0)
    c = ModelConfig.preset(name)
    c = ModelConfig(**{**c.model_dump(), "n_layer": 1, "vocab_size": 50, "context_length": 16})
    model = GPTModel(c)
    ids = torch.randint(50, (2, 17))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    results = []
    for loss in (next_token_loss, compiling.compiled(next_token_loss)):
        model.zero_grad()
        summed, scored = loss(model, batch)
        summed.backward()
        results.append([summed.detach(), scored, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

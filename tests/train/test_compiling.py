import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import compiling
from gptsmith.train.compiling import decide
from gptsmith.train.loss import next_token_loss

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
    assert decide("on", CPU, 1.0, None) == (True, "as set")
    assert decide("off", CUDA, 1e30, None) == (False, "as set")


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


def packed(*lengths: int, T: int = 16) -> tuple[Tensor, Tensor]:
    """Numbers and positions (T,) of documents of these lengths in one row, padding after them."""
    documents = torch.full((T,), len(lengths))
    positions = torch.zeros(T, dtype=torch.long)
    start = 0
    for number, length in enumerate(lengths):
        documents[start : start + length] = number
        positions[start : start + length] = torch.arange(length)
        start += length
    return documents, positions


def batches(of: str) -> list[Batch]:
    """Three batches of equal shape."""
    made = []
    rows = [[(5, 7, 3), (16,)], [(1, 1, 14), (8,)], [(16,), (2, 3, 4)]]
    for number, lengths in enumerate(rows):
        ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(number))
        batch = Batch(ids[:, :-1], ids[:, 1:].clone(), name=f"batch {number}")
        if of == "packed rows":
            documents, positions = (
                torch.stack(x) for x in zip(*(packed(*row) for row in lengths), strict=True)
            )
            batch.targets[documents != documents.roll(-1, 1)] = (
                IGNORE_INDEX  # another document's token
            )
            tokens = sum(map(sum, lengths))
            batch = replace(batch, documents=documents, positions=positions, tokens=tokens)
        made.append(batch)
    return made


# torch makes such an object itself when it traces one of ours
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("of", ["whole rows", "packed rows"])
@pytest.mark.parametrize("name", ["tiny", "fast"])
def test_the_loss_is_one_graph_with_the_same_gradients(
    name: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, differentiated and run as a graph, without the minute of making machine code. One
    graph serves all batches of a shape: a run that compiled at each step would never end."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: real(f, backend="aot_eager", fullgraph=True, **given)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    c = ModelConfig.preset(name)
    c = ModelConfig(**{**c.model_dump(), "n_layer": 1, "vocab_size": 50, "context_length": 16})
    model = GPTModel(c)
    compiled = compiling.compiled(next_token_loss)
    for batch in batches(of):
        results = []
        for loss in (next_token_loss, compiled):
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=True):
                summed = loss(model, batch)
            summed.backward()
            results.append([summed.detach(), *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_frozen_head_compiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """LinearCrossEntropy then saves nothing for the head's gradient."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: real(f, backend="aot_eager", fullgraph=True, **given)
    )
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=1, n_embd=8, d_ff=8, context_length=16, vocab_size=50)
    model = GPTModel(ModelConfig(**sizes, tie_embeddings=False))
    model.head_weight.requires_grad_(False)
    batch = batches("whole rows")[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    plain, graph = (
        torch.autograd.grad(loss(model, batch), trained)
        for loss in (next_token_loss, compiling.compiled(next_token_loss))
    )
    for a, b in zip(plain, graph, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

"""What a GPU would stumble over, found without one.

The meta device has shapes and no numbers: a tensor on another device cannot be combined with its
tensors, and whatever a GPU would have to be waited for (`item`, `tolist`, `nonzero`) raises.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptsmith import compilers
from gptsmith.batch import Batch
from gptsmith.evaluate import classification
from gptsmith.model import attention
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.kv_cache import KVCache, PagedKVCache
from gptsmith.model.masks import Mask
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision

META = torch.device("meta")
T, V = 32, 50
AXES = {
    "llama": {},
    "gpt2": dict(norm="layernorm", mlp="gelu", position="learned", bias="all"),
    "grouped": dict(n_kv_head=1, qk_norm=True),
    "window": dict(mask="causal() & sliding_window(9)"),
    "look-ahead": dict(mask="prefix(5)"),
}
axes_of_models = pytest.mark.parametrize("axes", AXES.values(), ids=AXES)


@pytest.fixture(autouse=True)
def _autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast is off, but PyTorch does not say so for this device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


def model_of(axes: dict[str, Any], device: torch.device = META, **fields: Any) -> GPTModel:
    sizes = dict(n_layer=2, n_head=2, n_embd=32, d_ff=8, context_length=T, vocab_size=V)
    config = ModelConfig(**{**sizes, **axes, **fields})
    return (GPTClassifier if config.labels else GPTModel)(config).to(device)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@axes_of_models
def test_training_waits_for_no_number(axes: dict[str, Any], packed: bool, kind: str) -> None:
    model = model_of(axes)
    ids = torch.zeros(2, T, dtype=torch.long)
    documents, positions = (ids, torch.arange(T).expand(2, T)) if packed else (None, None)
    batch = Batch(ids, ids, documents, positions).to(META)
    next_token_loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer = Optimizer(model, OptimConfig(kind=kind), "cpu")
    for each in optimizer.optimizers:
        each.defaults["fused"] = False
        for group in each.param_groups:
            group["fused"] = False  # the kernel exists for real devices only
    optimizer.step()
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())


@axes_of_models
def test_the_cache_waits_for_no_number(axes: dict[str, Any]) -> None:
    model = model_of(axes).eval()
    cache = KVCache.for_model(model.config, model.mask, 2, device=META)

    def ids(length: int) -> Tensor:
        return torch.zeros(2, length, dtype=torch.long, device=META)

    with torch.inference_mode():
        positions = cache.next_positions(8)
        positions[1, 6:] = -1  # a shorter row, padded
        model.hidden(ids(8), positions=positions, cache=cache)
        for _ in range(3):
            x = model.hidden(ids(1), cache=cache)
    assert x.device == META
    assert cache.lengths == [11, 9]


@axes_of_models
def test_pages_wait_for_no_number(axes: dict[str, Any]) -> None:
    model = model_of(axes).eval()
    cache = PagedKVCache(model.config, 4, device=META)
    cache.grow(6)
    with torch.inference_mode():
        for spans in ([(0, 8), (0, 6)], [(8, 9), (6, 7)]):
            cache.use([
                SimpleNamespace(start=start, stop=stop, pages=range(3 * i, 3 * i + 3), first=0)
                for i, (start, stop) in enumerate(spans)
            ])  # fmt: skip
            T = max(stop - start for start, stop in spans)
            ids = torch.zeros(2, T, dtype=torch.long, device=META)
            assert model.hidden(ids, cache=cache).device == META


@pytest.mark.parametrize("look", ["prefix(5)", "causal() & sliding_window(9)"])
def test_no_block_mask_for_widths_that_change(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention would compile a kernel for each width of a classifier's texts."""
    made = []
    monkeypatch.setattr(attention, "is_cuda", lambda device: True)
    monkeypatch.setattr(attention, "has_flex", lambda device: True)
    monkeypatch.setattr(Mask, "block_mask", lambda self, *sizes: made.append(sizes))
    texts = [np.arange(n) for n in range(1, T)]
    model = model_of(dict(mask=look), torch.device("cpu"), labels=("a", "b"))
    classification.log_probabilities(model, texts, Precision("fp32", "cpu", ""), batch_size=2)
    model.train()
    for n in (5, 9, 12):
        ids = torch.zeros(1, n, dtype=torch.long)
        model.hidden(ids, documents=torch.zeros_like(ids)).sum().backward()
    assert {width for _, _, width, _ in made} <= {T}


def test_a_gpu_without_triton_has_dense_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dict(mask="causal() & sliding_window(9)"), torch.device("cpu"))
    ids = torch.arange(T)[None]
    expected = model(ids)
    monkeypatch.setattr(attention, "is_cuda", lambda device: True)
    monkeypatch.setattr(compilers, "missing", lambda kind: "there is no C compiler")
    monkeypatch.setattr(attention, "has_flex", attention.has_flex.__wrapped__)
    monkeypatch.delattr(Mask, "block_mask")
    torch.testing.assert_close(model(ids), expected)


def test_classes_in_double_precision_are_computed_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MPS has no float64."""

    class OnMps(Tensor):
        def double(self) -> Tensor:
            raise TypeError("MPS does not support float64")

        def cpu(self) -> Tensor:
            return self.as_subclass(Tensor)

    real = GPTClassifier.logits
    monkeypatch.setattr(GPTClassifier, "logits", lambda *given: real(*given).as_subclass(OnMps))
    model = model_of({}, torch.device("cpu"), labels=("a", "b"))
    found = classification.log_probabilities(model, [np.arange(3)], Precision("fp32", "cpu", ""))
    assert np.exp(found).sum() == pytest.approx(1)

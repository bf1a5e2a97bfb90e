"""Training, scoring and generation on a device that is not the CPU give what the CPU gives.

No tensor is made on the wrong device, and the host waits for the device as rarely as it should.
tests/test_gpu.py compares the same with a real GPU.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pretend_device
import pytest
import torch
from random_weights import randomize

from gptsmith.batch import IGNORE_INDEX, Batch, PairBatch
from gptsmith.evaluate import likelihood, perplexity
from gptsmith.evaluate.classification import log_probabilities
from gptsmith.generate import forward
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import LoraConfig, ModelConfig, Quantization
from gptsmith.model.gpt import GPTModel
from gptsmith.model.quantized import replace_linears
from gptsmith.model.tuning import Tuning
from gptsmith.recipes.reference import TopTokens
from gptsmith.train.loss import classification_loss, next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.preference import PreferenceLoss
from gptsmith.train.runtime import Precision
from gptsmith.train.step import Step, train_steps

CPU, FP32 = torch.device("cpu"), Precision("fp32", "cpu", "")
T, V, STEPS = 32, 60, 2
R = TypeVar("R")
SIZES = dict(n_layer=1, n_head=2, n_embd=32, context_length=T, vocab_size=V)
AXES = {
    "llama": {},
    "gpt2": dict(norm="layernorm", mlp="gelu", position="learned", bias="all"),
    "grouped window": dict(n_kv_head=1, qk_norm=True, mask="causal() & sliding_window(9)"),
    "look-ahead": dict(mask="prefix(5)"),
}
of_axes = pytest.mark.parametrize("axes", AXES.values(), ids=AXES)


@pytest.fixture(autouse=True)
def _what_pytorch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch has no autocast for this device, not even one that is off, and in inference mode it
    # does not divide operations into those that the device sees.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: nullcontext())
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)


def on_both(run: Callable[[torch.device], R]) -> tuple[R, R]:
    """The result of the CPU and of the device."""
    on_cpu = run(CPU)
    with pretend_device.pretend_device() as device:
        return on_cpu, run(device)


def model_of(axes: dict[str, Any], device: torch.device, **fields: Any) -> Any:
    config = ModelConfig(**{**SIZES, **axes, **fields})
    model = (GPTClassifier if config.labels else GPTModel)(config)
    randomize(model, size=0.1)
    return model.to(device)


def batches(step: int, packed: bool) -> list[Batch]:
    """Two micro-batches; packed: of several documents."""
    made = []
    for i in range(2):
        generator = torch.Generator().manual_seed(10 * step + i)
        ids = torch.randint(V, (2, T + 1), generator=generator)
        batch = Batch(ids[:, :-1], ids[:, 1:].clone())
        batch.targets[:, : 5 + step] = IGNORE_INDEX
        if packed:
            documents = torch.arange(T).expand(2, T) // 11
            positions = torch.arange(T).expand(2, T) % 11
            batch = replace(batch, documents=documents, positions=positions)
        made.append(batch)
    return made


def train(model: Any, make: Any, loss: Any, kind: str, precision: Precision = FP32) -> list[Step]:
    optimizer = Optimizer(model, OptimConfig(kind=kind), "cpu")
    for each in optimizer.optimizers:
        for group in (each.defaults, *each.param_groups):
            group["fused"] = False  # the kernel exists for real devices only
    steps = train_steps(
        model, loss, make, optimizer, learning_rate=lambda step: 1e-3, precision=precision,
        max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    return list(itertools.islice(steps, STEPS))


def assert_like(steps: list[Step], expected: list[Step]) -> None:
    for a, b in zip(steps, expected, strict=True):
        assert not a.skipped
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


@pytest.mark.parametrize(("axes", "packed"), [("gpt2", True), ("grouped window", False)])
def test_pretraining(axes: str, packed: bool) -> None:
    assert_like(
        *on_both(
            lambda device: train(
                model_of(AXES[axes], device),
                lambda step: batches(step, packed),
                next_token_loss,
                "adamw" if packed else "muon",
            )
        )
    )
    assert len(pretend_device.waits) <= 3 * STEPS, pretend_device.waits


def test_preferences() -> None:
    def pairs(step: int) -> list[PairBatch]:
        reference = torch.tensor([-90.0, -95.0])
        return [
            PairBatch(batch.inputs, batch.targets, count=1, reference=reference)
            for batch in batches(step, packed=False)
        ]

    def divergence(device: torch.device) -> float:
        batch = pairs(0)[0]
        targets = (batch.targets != IGNORE_INDEX).sum(1)
        ids = torch.arange(4, dtype=torch.int32).expand(int(targets.sum()), 4)
        offsets = np.array([0, int(targets[0]), int(targets.sum())])
        top = TopTokens(ids, torch.full(ids.shape, -3.0), offsets)
        with torch.no_grad():
            return float(top.divergence(model_of({}, device), batch.to(device), [0]))

    loss = PreferenceLoss("sigmoid", 0.1)
    a, b = on_both(lambda device: train(model_of({}, device), pairs, loss, "adamw"))
    assert_like(a, b)
    assert a[0].metrics == pytest.approx(b[0].metrics, rel=1e-4)
    on_cpu, on_device = on_both(divergence)
    assert on_device == pytest.approx(on_cpu, rel=1e-4)


def test_training_in_fp8() -> None:
    fp8 = Precision("fp8", "cpu", "")  # without autocast, as it is patched here
    found = on_both(
        lambda device: train(
            model_of(AXES["gpt2"], device), lambda step: batches(step, True), next_token_loss,
            "adamw", fp8,
        )
    )  # fmt: skip
    for a, b in zip(*found, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-2)
    assert len(pretend_device.waits) <= 3 * STEPS, pretend_device.waits


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_fine_tuning_with_lora_and_recomputed_blocks(quantize: Quantization | None) -> None:
    def run(device: torch.device) -> list[Step]:
        model = model_of(AXES["grouped window"], CPU)
        if quantize:
            replace_linears(model, quantize)
        torch.manual_seed(0)
        Tuning(lora=LoraConfig(rank=4), freeze=()).wrap(model)
        model.activation_checkpointing = True
        return train(model.to(device), lambda step: batches(step, True), next_token_loss, "adamw")

    assert_like(*on_both(run))


def test_classes() -> None:
    def make(step: int) -> list[Batch]:
        ends = torch.full((2, T), IGNORE_INDEX)
        ends[:, 20] = torch.tensor([0, 2])
        return [Batch(torch.arange(2 * T).view(2, T) % V, ends)]

    def run(device: torch.device) -> tuple[list[Step], np.ndarray]:
        model = model_of(AXES["gpt2"], device, labels=("a", "b", "c"))
        steps = train(model, make, classification_loss, "adamw")
        texts = [np.arange(n) for n in (1, 5, 9, 13)]
        return steps, log_probabilities(model, texts, FP32, batch_size=2)

    (expected, on_cpu), (steps, found) = on_both(run)
    assert_like(steps, expected)
    np.testing.assert_allclose(found, on_cpu, rtol=1e-3, atol=1e-4)


@of_axes
def test_validation(axes: dict[str, Any]) -> None:
    packed = axes in (AXES["gpt2"], AXES["grouped window"])
    sizes = torch.arange(V) % 5
    a, b = on_both(
        lambda device: perplexity.evaluate(model_of(axes, device), batches(0, packed), FP32, sizes)
    )
    assert (a.loss, a.bits_per_byte) == pytest.approx((b.loss, b.bits_per_byte), rel=1e-4)
    assert (a.tokens, a.top1, a.top5) == (b.tokens, b.top1, b.top5)
    assert pretend_device.waits == ["to the CPU"] * 2 * 2  # of 2 batches: nats and ranks


@of_axes
def test_likelihoods(axes: dict[str, Any]) -> None:
    requests = [
        likelihood.Request([*range(12), n, n + 1], [n + 5, *range(m)])
        for n in range(3)
        for m in (1, 3)
    ]
    a, b = on_both(lambda device: likelihood.log_likelihoods(model_of(axes, device), requests))
    assert [x.nats for x in a] == pytest.approx([x.nats for x in b], rel=1e-4)
    assert [x.greedy for x in a] == [x.greedy for x in b]


@pytest.mark.parametrize("axes", ["gpt2", "grouped window"])
def test_generation(axes: str) -> None:
    """With torch's own operations, which other devices than the CPU use."""
    sampling = SamplingConfig(max_new_tokens=4, top_k=20, top_p=0.9, repetition_penalty=1.2)

    def run(device: torch.device) -> list[list[int]]:
        engine = Engine(model_of(AXES[axes], device), page=4)
        return [g.ids for g in engine.generate([[7] * 3, list(range(9))], sampling)]

    a, b = on_both(run)
    assert a == b


@pytest.mark.parametrize("axes", ["gpt2", "grouped window"])
def test_a_step_of_decoding_uploads_once_and_reads_once(
    axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the static step that a GPU runs as a graph."""
    settings = [
        SamplingConfig(temperature=0, max_new_tokens=8),
        SamplingConfig(max_new_tokens=8, min_p=0.05),
        SamplingConfig(max_new_tokens=8, top_k=9, top_p=0.9),
    ]
    penalized = SamplingConfig(max_new_tokens=4, repetition_penalty=1.3)

    def run(device: torch.device) -> list[list[int]]:
        monkeypatch.setattr(forward, "decodes_by_graph", lambda at: at == device != CPU)
        engine = Engine(model_of(AXES[axes], device), page=4)
        rows = [engine.add(Request([7 + i, *range(4 + i)], s)) for i, s in enumerate(settings)]
        engine.step()
        for _ in range(4):  # some need more pages
            made = engine._forward.cache.k
            pretend_device.waits.clear()
            pretend_device.uploads.clear()
            engine.step()
            if engine._forward.cache.k is made and device != CPU:
                assert pretend_device.waits == ["tolist"]
                assert len(pretend_device.uploads) == 1
        rows.append(engine.add(Request([3, 4, 5, 6, 7], penalized)))  # that row is up to the host
        while engine.busy:
            engine.step()
        return [row.ids for row in rows]

    a, b = on_both(run)
    assert a == b


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    with pretend_device.pretend_device() as device:
        with pytest.raises(AssertionError, match="tensors of two devices"):
            torch.zeros(3, device=device) + torch.zeros(3)
        assert float(torch.ones(3, device=device).sum() + torch.tensor(2.0)) == 5
        assert pretend_device.waits == ["aten._local_scalar_dense.default"]
        with pytest.raises((RuntimeError, TypeError)):
            torch.zeros(3, device=device).numpy()

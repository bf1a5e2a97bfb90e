"""A GPU computes what the CPU does: training, scoring, generation.

python -m pytest -m gpu                            where there is a CUDA device
GPTSMITH_TEST_DEVICE=cpu python -m pytest -m gpu   the same path on the CPU, to check the tests

test_gpu_runs.py has whole commands.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu import AXES, DEVICE, GPT2, SIZES, T, V, model_of, needs_fp8, on_a_gpu
from random_weights import randomize
from torch import nn

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.evaluate import likelihood, perplexity
from gptsmith.evaluate.classification import log_probabilities
from gptsmith.generate import forward
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Generation, Request
from gptsmith.model import decode_cache
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import LoraConfig, ModelConfig, Quantization
from gptsmith.model.gpt import GPTModel
from gptsmith.model.quantized import replace_linears
from gptsmith.model.tuning import Tuning
from gptsmith.recipes.prefetch import Prefetch
from gptsmith.train import fp8, runtime
from gptsmith.train.checkpoint_writer import HostMemory
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.step import Step, train_steps

pytestmark = on_a_gpu


def batches(step: int, packed: bool = False, B: int = 4) -> list[Batch]:
    """Two micro-batches; packed: of several documents, whose borders move from step to step."""
    made = []
    for i in range(2):
        generator = torch.Generator().manual_seed(10 * step + i)
        ids = torch.randint(V, (B, T + 1), generator=generator)
        batch = Batch(ids[:, :-1], ids[:, 1:].clone(), name=f"step {step}, batch {i}")
        batch.targets[:, : 5 + step] = IGNORE_INDEX
        if packed:
            starts = torch.rand(B, T, generator=generator) < 0.04
            starts[:, 0] = True
            at = torch.arange(T).expand(B, T)
            positions = at - torch.where(starts, at, 0).cummax(dim=1).values
            batch = replace(batch, documents=starts.cumsum(dim=1), positions=positions)
        made.append(batch)
    return made


def train(
    model: GPTModel,
    device: str,
    precision: str = "fp32",
    *,
    n: int = 3,
    compiled: bool = False,
    packed: bool = False,
    kind: str = "muon",
    rate: float = 1e-3,
) -> list[Step]:
    model.to(device)
    run = train_steps(
        model,
        runtime.compiled(next_token_loss) if compiled else next_token_loss,
        lambda step: batches(step, packed),
        Optimizer(model, OptimConfig(kind=kind), device),
        learning_rate=lambda step: rate,
        precision=Precision(precision, device, ""),
        max_grad_norm=1.0,
        seed=0,
        scaler=torch.amp.GradScaler(device) if precision == "fp16" else None,
    )
    return list(itertools.islice(run, n))


def assert_like(steps: list[Step], expected: list[Step], rtol: float) -> None:
    for a, b in zip(steps, expected, strict=True):
        assert not a.skipped
        assert a.loss == pytest.approx(b.loss, rel=rtol)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=10 * rtol)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_training_equals_the_cpus(axes: dict[str, object], packed: bool, compiled: bool) -> None:
    expected = train(model_of(axes), "cpu", packed=packed)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    steps = train(model_of(axes), DEVICE, packed=packed, compiled=compiled)
    assert_like(steps, expected, 1e-3)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("axes", ["gpt2", "grouped"])
def test_bf16_is_near_fp32(axes: str, packed: bool, compiled: bool) -> None:
    expected = train(model_of(AXES[axes]), "cpu", packed=packed)
    steps = train(model_of(AXES[axes]), DEVICE, "bf16", packed=packed, compiled=compiled)
    assert_like(steps, expected, 2e-2)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fp16_trains_with_its_scaler(kind: str, compiled: bool) -> None:
    if DEVICE == "cpu":
        pytest.skip("fp16 is for GPUs")
    expected = train(model_of(GPT2), "cpu", kind=kind, n=20)
    steps = train(model_of(GPT2), DEVICE, "fp16", kind=kind, n=20, compiled=compiled)
    overflows = [step for step in steps if step.skipped]
    assert all("fp16 overflow at loss scale" in step.skipped for step in overflows)
    assert len(overflows) <= 10
    assert steps[-1].loss == pytest.approx(expected[-1].loss, rel=0.02)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_lora_and_activation_checkpointing(
    quantize: Quantization | None, recompute: bool, compiled: bool
) -> None:
    results = []
    for device in ("cpu", DEVICE):
        model = model_of(AXES["grouped"])
        if quantize:
            replace_linears(model, quantize)
        torch.manual_seed(0)
        Tuning(lora=LoraConfig(rank=4), freeze=()).wrap(model)
        model.activation_checkpointing = recompute
        on = compiled and device == DEVICE
        results.append(train(model, device, packed=recompute, compiled=on))
    assert_like(results[1], results[0], 1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dropout_trains(compiled: bool) -> None:
    model = model_of({**GPT2, "dropout": 0.1})
    for packed in (False, True):
        steps = train(model, DEVICE, "bf16", packed=packed, compiled=compiled)
        assert all(math.isfinite(step.loss) and not step.skipped for step in steps)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_greedy_texts_equal_the_cpus(axes: dict[str, object]) -> None:
    prompts = [[7] * 3, [11, 12, 13, 200], list(range(30)), [5] * (T - 10)]
    texts = [
        [g.ids for g in Engine(model_of(axes, device)).generate(prompts, SamplingConfig(
            temperature=0, max_new_tokens=40))]
        for device in ("cpu", DEVICE)
    ]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_sampled_texts_equal_the_cpus(axes: dict[str, object]) -> None:
    sampling = SamplingConfig(
        max_new_tokens=30, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2
    )
    texts = [
        [g.ids for g in Engine(model_of(axes, device)).generate([[1, 2], [3]], sampling)]
        for device in ("cpu", DEVICE)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_generate(dtype: torch.dtype) -> None:
    model = model_of(AXES["grouped"], DEVICE).to(dtype)
    [a, b] = Engine(model).generate([[1], [2] * 20], SamplingConfig(max_new_tokens=20))
    assert len(a.ids) == len(b.ids) == 20


# --- decoding by graphs --------------------------------------------------------------------------


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Engines that are made from now on decode by the static step, or not."""
    return lambda on: monkeypatch.setattr(forward, "decodes_by_graph", lambda device: on)


def mixed_requests() -> list[Request]:
    """Greedy, sampled and penalized, prompts of 1 to 100 tokens, some with log-probabilities."""
    kinds = [
        SamplingConfig(temperature=0, max_new_tokens=25),
        SamplingConfig(max_new_tokens=18, min_p=0.02),
        SamplingConfig(max_new_tokens=9, top_k=50, top_p=0.9),
        SamplingConfig(max_new_tokens=12, repetition_penalty=1.2),
    ]
    return [
        Request([n % V, *range(n)], kinds[n % 4].with_seed(n), logprobs=2 if n % 5 == 0 else None)
        for n in [*range(0, 100, 7), 3, 3, 3]
    ]


def complete(engine: Engine) -> list[Generation]:
    """Requests that join one after the other."""
    made = []
    for request in mixed_requests():
        made.append(engine.add(request))
        engine.step()
    while engine.busy:
        engine.step()
    return made


@pytest.mark.parametrize("tokens", [None, 3 * T], ids=["much memory", "little memory"])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_graphs_give_the_texts_of_launched_operations(
    axes: dict[str, object], tokens: int | None, static: Callable[[bool], None]
) -> None:
    model, texts = model_of(axes, DEVICE), []
    for on in (False, True):
        static(on)
        engine = Engine(model, cache_tokens=tokens)
        texts.append([g.ids for g in complete(engine)])
        if on and DEVICE == "cuda":
            assert captured(engine)
    assert texts[0] == texts[1]


def captured(engine: Engine) -> list[torch.cuda.CUDAGraph]:
    assert isinstance(engine._forward, forward.TorchForward)
    assert engine._forward._step is not None
    return [step._graph for step in engine._forward._step._steps.values() if step._graph]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes", ["gpt2", "grouped", "window", "grouped window"])
def test_attention_through_the_page_table_equals_that_over_copies(
    axes: str, dtype: torch.dtype, static: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities along a given text, by FlashAttention and by gathered pages."""
    model = model_of({**AXES[axes], "context_length": 800}, DEVICE).to(dtype)
    if not decode_cache.flash_serves(dtype, model.config.D, model.head_weight.device):
        pytest.skip("needs PyTorch 2.13 and a GPU of compute capability 8.0 or later")
    bias = {7: 100.0}  # every text goes on in the same way
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    static(True)
    found = []
    for page in (None, 16):
        engine = Engine(model, page=page)
        assert engine._pages.size == (page or decode_cache.FLASH_PAGE)
        made = [
            engine.add(Request([*range(n)], sampling, logprobs=0, logit_bias=bias))
            for n in (3, 90, 250, 300)
        ]
        while engine.busy:
            engine.step()
        assert all(g.ids == [7] * 20 for g in made)
        found.append(torch.tensor([[x.logprob for x in g.logprobs] for g in made]))
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0.02)


def test_refresh_replaces_the_graphs_of_old_weights(static: Callable[[bool], None]) -> None:
    static(True)
    model = model_of(AXES["gpt2"], DEVICE)
    engine = Engine(model)
    before = [g.ids for g in complete(engine)]
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        engine.refresh()
        after = [g.ids for g in complete(engine)]
        assert after == [g.ids for g in complete(Engine(model))]
        assert after != before
        before = after


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_likelihoods_equal_the_cpus(axes: dict[str, object]) -> None:
    context = list(range(40))
    requests = [
        likelihood.Request([*context, n, n + 1], [n + 5, *range(m)])
        for n in range(12)
        for m in (1, 3, 6)
    ]
    on_cpu, here = (
        likelihood.log_likelihoods(model_of(axes, device), requests) for device in ("cpu", DEVICE)
    )
    for a, b in zip(on_cpu, here, strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-3)
        assert a.greedy == b.greedy


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_validation_equals_the_cpus(axes: dict[str, object], packed: bool) -> None:
    a, b = (
        perplexity.evaluate(
            model_of(axes, device),
            [*batches(0, packed), *batches(1, packed, B=1)],
            Precision("fp32", device, ""),
        )
        for device in ("cpu", DEVICE)
    )
    assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert (a.tokens, a.top1, a.top5) == (b.tokens, pytest.approx(b.top1), pytest.approx(b.top5))


@pytest.mark.parametrize("axes", ["gpt2", "grouped", "look-ahead"])
def test_classes_equal_the_cpus(axes: str) -> None:
    """Texts of 24 lengths: no kernel may be compiled for each."""
    texts = [np.arange(n) for n in range(1, 97, 4)]
    results = []
    for device in ("cpu", DEVICE):
        model = GPTClassifier(ModelConfig(**{**SIZES, **AXES[axes]}, labels=("a", "b", "c")))
        randomize(model, size=0.1)
        precision = Precision("fp32", device, "")
        results.append(log_probabilities(model.to(device), texts, precision, batch_size=2))
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-4)


def test_batches_are_made_ahead_in_pinned_memory_and_copies_for_checkpoints_too() -> None:
    device = torch.device(DEVICE)
    ids = torch.arange(64).view(2, 32)
    ahead = Prefetch(lambda step: [Batch(ids + step, ids, documents=ids)], device)
    for step in range(3):
        [batch] = ahead(step)
        moved = batch.to(device)
        assert torch.equal(moved.inputs.cpu(), ids + step)
        weight = torch.full((1000, 1000), float(step), device=device)
        copy = HostMemory().copy({"weight": weight})["weight"]
        weight.zero_()
        assert (copy == step).all()
        if device.type == "cuda":
            assert batch.inputs.is_pinned()
            assert batch.documents is not None
            assert batch.documents.is_pinned()
            assert copy.is_pinned()


@needs_fp8
@pytest.mark.parametrize("rows", [256, 200, 1])
def test_fp8_products_equal_those_of_the_rounded_numbers(rows: int) -> None:
    """The kernel against the CPU, which multiplies the same 8-bit numbers; tests/train/test_fp8.py
    compares the CPU with an emulation."""
    torch.manual_seed(0)
    x, grad = torch.randn(rows, 192), torch.randn(rows, 320)
    results = []
    for device in ("cpu", DEVICE):
        linear = fp8.Fp8Linear(192, 320, bias=False)
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
        linear.to(device)
        there = x.to(device).requires_grad_()
        y = linear(there)
        y.backward(grad.to(device))
        assert there.grad is not None
        assert linear.weight.grad is not None
        results.append([t.detach().cpu() for t in (y, there.grad, linear.weight.grad)])
    for on_cpu, here in zip(*results, strict=True):  # `fast` sums keep about 14 bits
        torch.testing.assert_close(here, on_cpu, rtol=1e-2, atol=1e-3 * float(on_cpu.abs().max()))


@needs_fp8
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("axes", ["gpt2", "grouped"])
def test_fp8_is_near_fp32(axes: str, packed: bool, compiled: bool) -> None:
    expected = train(model_of(AXES[axes]), "cpu", packed=packed)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    steps = train(model_of(AXES[axes]), DEVICE, "fp8", packed=packed, compiled=compiled)
    assert_like(steps, expected, 3e-2)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_fp8
def test_fp8_trains_adapters_with_recomputed_blocks() -> None:
    results = []
    for device, precision in (("cpu", "fp32"), (DEVICE, "fp8")):
        model = model_of(AXES["grouped"])
        torch.manual_seed(0)
        Tuning(lora=LoraConfig(rank=4), freeze=()).wrap(model)
        model.activation_checkpointing = True
        results.append(train(model, device, precision))
    assert_like(results[1], results[0], 3e-2)


def test_two_runs_of_one_seed_are_alike() -> None:
    steps = [train(model_of(GPT2), DEVICE, "bf16", n=10, compiled=True) for _ in range(2)]
    assert_like(steps[0], steps[1], 1e-3)

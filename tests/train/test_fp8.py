"""FP8 training, against an emulation that rounds to FP8 and multiplies in fp32.

torch._scaled_mm also exists on the CPU, so the product itself is tested here. What a GPU demands
besides (layouts, multiples of 16), PyTorch checks on fake tensors of a GPU.
"""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import randomize
from runs import assert_same_checkpoints, assert_same_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gptsmith import cli
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.tuning import Tuning
from gptsmith.train import fp8, runtime
from gptsmith.train.loss import classification_loss, next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.step import Step, train_steps

T, V = 16, 60
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GPT2 = dict(norm="layernorm", mlp="gelu", position="learned", bias="all")
AXES = {"llama": {}, "gpt2": GPT2, "grouped": dict(n_kv_head=1, qk_norm=True)}


def emulated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as FP8 stores it, in float64: what a computation in FP8 sees of it."""
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).double() * scale.double()


def linear_of(K: int, M: int, bias: bool = True) -> fp8.Fp8Linear:
    torch.manual_seed(0)
    linear = fp8.Fp8Linear(K, M, bias=bias)
    nn.init.normal_(linear.weight, std=0.1)
    return linear


def model_of(axes: dict[str, object], **fields: object) -> GPTModel:
    sizes = dict(n_layer=1, n_head=2, n_embd=32, context_length=T, vocab_size=V)
    config = ModelConfig(**{**sizes, **axes, **fields})
    model = (GPTClassifier if config.labels else GPTModel)(config)
    randomize(model, size=0.1)
    return model


def batch_of(seed: int = 0, B: int = 3) -> Batch:
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:].clone())


def train(model: GPTModel, precision: str, steps: int = 2, rate: float = 1e-3) -> list[Step]:
    run = train_steps(
        model, next_token_loss, lambda step: [batch_of()],
        Optimizer(model, OptimConfig(kind="adamw"), "cpu"), learning_rate=lambda step: rate,
        precision=Precision(precision, "cpu", ""), max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    return list(itertools.islice(run, steps))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The CPU's product, with the demands of a GPU. Returns (N, K, M) of each product."""
    multiply, sizes = fp8.multiply, []

    def checked(a: Tensor, b: Tensor, scales: Any, *options: Any, **named: Any) -> Tensor:
        with FakeTensorMode():
            fakes = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                for x in (a, b, *scales)
            ]
            multiply(*fakes[:2], fakes[2:], *options, **named)
        sizes.append((*a.shape, b.shape[1]))
        return multiply(a, b, scales, *options, **named)

    monkeypatch.setattr(fp8, "multiply", checked)
    return sizes


# --- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("shape", [(32,), (2, 16), (3, 5), (1,), (2, 2, 4)])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_products_equal_those_of_the_rounded_numbers(shape: tuple[int, ...], size: float) -> None:
    """Whatever the magnitude, and for numbers of rows that the kernel must get padded."""
    linear = linear_of(48, 32, bias=False)
    x = (torch.randn(*shape, 48) * size).requires_grad_()
    grad = torch.randn(*shape, 32) / size
    y = linear(x)
    y.backward(grad)

    x8, w8 = emulated(x.detach(), E4M3).view(-1, 48), emulated(linear.weight.detach(), E4M3)
    g8 = emulated(grad, E5M2).view(-1, 32)
    torch.testing.assert_close(y.double().view(-1, 32), x8 @ w8.T, rtol=1e-4, atol=1e-5 * size)
    assert x.grad is not None
    assert linear.weight.grad is not None
    torch.testing.assert_close(x.grad.double().view(-1, 48), g8 @ w8, rtol=1e-4, atol=1e-5 / size)
    torch.testing.assert_close(linear.weight.grad.double(), g8.T @ x8, rtol=1e-4, atol=1e-5)


def test_the_error_is_that_of_the_formats() -> None:
    """Rounding to 3 bits of mantissa is off by 2^-4 at most, 2.6% as a root mean square, to 2 bits
    twice that. Errors of two factors are independent, and those of a sum average out."""
    linear = linear_of(256, 256, bias=False)
    x = torch.randn(512, 256, requires_grad=True)
    grad = torch.randn(512, 256)
    linear(x).backward(grad)

    def off(found: Tensor | None, expected: Tensor) -> float:
        assert found is not None
        return float(((found - expected).norm() / expected.norm()).detach())

    assert 0.02 < off(linear(x), x @ linear.weight.T) < 0.05
    assert 0.04 < off(x.grad, grad @ linear.weight) < 0.08
    assert 0.04 < off(linear.weight.grad, grad.T @ x) < 0.08


def test_the_demands_of_a_gpu_are_checked(as_on_a_gpu: list[tuple[int, ...]]) -> None:
    with pytest.raises(RuntimeError, match="divisible by 16"):
        linear_of(40, 32)(torch.ones(16, 40))
    assert as_on_a_gpu == []
    linear_of(48, 32)(torch.ones(3, 48)).sum().backward()
    assert as_on_a_gpu == [(16, 48, 32), (32, 16, 48)]  # forward, and the gradient of the weight


def test_zeros_stay_zeros_and_what_is_not_finite_shows() -> None:
    linear = linear_of(16, 16)
    x = torch.zeros(16, 16, requires_grad=True)
    linear(x).backward(torch.zeros(16, 16))
    assert torch.equal(linear(x), linear.bias.expand(16, 16))
    assert x.grad is not None
    assert not x.grad.any()
    assert not linear.weight.grad.any()
    for bad in (torch.nan, torch.inf):
        x = torch.ones(16, 16)
        x[3, 4] = bad
        assert linear(x).isnan().any()


def test_autocast_decides_the_result_and_gradients_have_the_dtype_of_their_tensor() -> None:
    linear, x = linear_of(32, 16), torch.randn(8, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()  # the gradient of a sum is one number, expanded
    assert x.grad is not None
    assert x.grad.dtype == linear.weight.grad.dtype == torch.float32
    assert torch.equal(linear.bias.grad, torch.full((16,), 8.0))


def test_a_frozen_weight_gets_no_gradient() -> None:
    linear, x = linear_of(32, 16), torch.randn(16, 32, requires_grad=True)
    linear.weight.requires_grad_(False)
    linear(x).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is None
    linear.weight.requires_grad_(True)
    linear(x.detach()).sum().backward()
    assert linear.weight.grad is not None


# --- a model -------------------------------------------------------------------------------------


def test_only_layers_of_the_blocks_change_and_nothing_but_their_products() -> None:
    model = model_of(GPT2, tie_embeddings=False)
    before = {name: id(p) for name, p in model.named_parameters()}
    ids = batch_of().inputs
    expected = model.eval()(ids)
    fp8.use_fp8(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == list(before)
    converted = {n.split(".", 2)[2] for n, m in model.named_modules() if type(m) is fp8.Fp8Linear}
    assert converted == {"attention.qkv", "attention.proj", "mlp.up", "mlp.down"}
    with torch.no_grad():  # evaluation and generation compute as ever, to the bit
        assert torch.equal(model(ids), expected)
    assert not torch.equal(model(ids), expected)


def test_sizes_that_do_not_fit_stay_as_they_are_or_are_rejected() -> None:
    with pytest.raises(ValueError, match="multiples of 16, and this model has none"):
        fp8.use_fp8(model_of({}, n_embd=40))
    model = model_of({}, d_ff=40)
    fp8.use_fp8(model)
    assert type(model.blocks[0].mlp.down) is nn.Linear
    assert type(model.blocks[0].attention.qkv) is fp8.Fp8Linear


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_training_is_near_that_in_bf16(axes: dict[str, object]) -> None:
    found, expected = (train(model_of(axes), precision) for precision in ("fp8", "bf16"))
    for a, b in zip(found, expected, strict=True):
        assert not a.skipped
        assert a.loss == pytest.approx(b.loss, rel=1e-2)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=0.1)
        assert a.loss != b.loss


def test_muon_still_updates_fused_matrices_one_by_one() -> None:
    model = model_of({})
    fp8.use_fp8(model)
    optimizer = Optimizer(model, OptimConfig(kind="muon"), "cpu")
    [muon] = [each for each in optimizer.optimizers if hasattr(each, "splits")]
    assert muon.splits[model.blocks[0].attention.qkv.weight] == (32, 32, 32)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_lora_trains_over_a_base_in_fp8_and_merges() -> None:
    model = model_of(AXES["grouped"])
    Tuning(lora=LoraConfig(rank=4)).wrap(model)
    model.activation_checkpointing = True
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    first, *_, last = train(model, "fp8", steps=6, rate=0.01)
    assert last.loss < first.loss - 0.01
    assert type(model.blocks[0].mlp.down.base) is fp8.Fp8Linear
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("axes", [AXES["gpt2"], AXES["grouped"]], ids=["gpt2", "grouped"])
def test_one_graph_computes_the_same(axes: dict[str, object]) -> None:
    losses, grads = [], []
    for compiled in (False, True):
        model = model_of(axes)
        fp8.use_fp8(model)
        loss: Callable[..., Tensor] = next_token_loss
        if compiled:
            torch.compiler.reset()
            loss = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
        value = loss(model, batch_of())
        value.backward()
        losses.append(float(value.detach()))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (grads[1] - grads[0]).norm() < 0.01 * grads[0].norm()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_classifiers_train() -> None:
    model = model_of(GPT2, labels=("a", "b"))
    fp8.use_fp8(model)
    targets = torch.full((3, T), IGNORE_INDEX)
    targets[:, -1] = torch.tensor([0, 1, 0])
    classification_loss(model, replace(batch_of(), targets=targets)).backward()
    assert model.score.weight.grad is not None
    assert model.blocks[0].mlp.up.weight.grad.isfinite().all()


# --- where it may be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "hip", "has"),
    [((8, 9), None, True), ((9, 0), None, True), ((12, 0), None, True), ((8, 6), None, False),
     ((9, 4), "6.3", False)],
)  # fmt: skip
def test_fp8_needs_a_gpu_that_has_it(
    capability: tuple[int, int], hip: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    cuda = torch.device("cuda")
    if has:
        chosen = runtime.choose_precision("fp8", cuda)
        assert (chosen.name, chosen.dtype) == ("fp8", torch.bfloat16)
        assert runtime.choose_precision("auto", cuda).name == "bf16"
    for device in [torch.device("cpu"), torch.device("mps")] + [cuda] * (not has):
        with pytest.raises(ValueError, match=r"fp8 needs an NVIDIA GPU of compute capability 8\.9"):
            runtime.choose_precision("fp8", device)


def pretrain(corpus: Path, run: Path) -> int:
    return cli.main([
        "pretrain", "--data", str(corpus), "--out", str(run), "--train.precision", "fp8",
        "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--train.batch-size",
        "2", "--model.context-length", "16", "--train.steps", "4", "--save.interval", "2",
        "--save.keep-last", "4", "--eval.tokens", "100", "--eval.sample-tokens", "0",
        "--monitor.trackers", "none", "--monitor.log-interval", "1",
    ])  # fmt: skip


def test_a_run_resumes_to_the_bit_and_is_evaluated_in_bf16(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    user_error: Callable[..., str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On the CPU, as if it were a GPU that has FP8."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "has_fp8", lambda device: True)
        assert pretrain(corpus, whole) == 0
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "step-000004")
        (run / "digests.json").unlink()
        assert cli.main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert_same_checkpoints(whole, run)
    assert_same_weights(whole, run)
    assert "needs an NVIDIA GPU" in user_error("pretrain", "--out", run, "--resume")
    assert "fp8" in user_error("evaluate", run, "--precision", "fp8")
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert "bf16, as in training's own evaluations" in capsys.readouterr().out

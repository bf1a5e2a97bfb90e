import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.optim import Muon, Optimizer, fused_rows, orthogonalize, share
from gptsmith.train.options import OptimConfig


def small(**fields: object) -> GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, context_length=8, vocab_size=20)
    return GPTModel(ModelConfig(**{**sizes, **fields}))


def fill_gradients(model: nn.Module, seed: int = 0, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (96, 128), (1, 8), (8, 1)])
def test_orthogonalize_pushes_singular_values_to_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-4, 1e4):
        y = orthogonalize((scale * x).to(dtype)).float()
        values = torch.linalg.svdvals(y)
        assert y.shape == x.shape
        assert 0.7 < float(values.min())
        assert float(values.max()) < 1.2
        # The singular vectors are those of x: the result is near x's polar factor.
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        assert float((y - u @ vh).norm() / (u @ vh).norm()) < 0.2


def test_orthogonalize_of_a_wide_spectrum_and_of_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(32, 32, generator=generator))
    values = torch.linalg.svdvals(orthogonalize((u * torch.logspace(0, -2, 32)) @ vh[None])[0])
    assert 0.7 < float(values.min())
    assert float(values.max()) < 1.2
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


def test_two_muon_steps_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    start, g1, g2 = (torch.randn(6, 10, generator=generator) for _ in range(3))
    p = nn.Parameter(start.clone())
    muon = Muon([p], lr=0.1, momentum=0.6, weight_decay=0.5, splits={}, dtype=torch.float32)
    expected, average = start, torch.zeros(6, 10)
    for grad in (g1, g2):
        p.grad = grad.clone()
        muon.step()
        average = 0.6 * average + 0.4 * grad
        direction = orthogonalize((0.6 * average + 0.4 * grad)[None])[0]  # Nesterov
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(10) * direction
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(p.grad, grad)


def test_muon_updates_have_the_rms_of_adamw_updates() -> None:
    """RMS 0.2 per element, whatever the shape and the gradient (Liu et al. 2025)."""
    for shape in ((16, 64), (64, 16), (48, 48)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([p], lr=1.0, momentum=0.95, weight_decay=0.0, splits={}, dtype=torch.float32).step()
        assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


def test_fused_matrices_are_updated_separately() -> None:
    rows = (8, 4, 4)
    whole = nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    parts = [nn.Parameter(x.clone()) for x in whole.detach().split(rows)]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    fused = Muon([whole], splits={whole: rows}, **options)
    apart = Muon(parts, splits={}, **options)
    for step in range(3):
        whole.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(step + 1))
        for part, grad in zip(parts, whole.grad.split(rows), strict=True):
            part.grad = grad.clone()
        fused.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]))


def test_fused_rows_of_a_model() -> None:
    model = small(mlp="swiglu", d_ff=24)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    found = {name: rows for name in matrices if (rows := fused_rows(model, name))}
    assert found == {
        f"blocks.{i}.{name}.weight": rows
        for i in range(2)
        for name, rows in (("attention.qkv", (16, 8, 8)), ("mlp.gate_up", (24, 24)))
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(kind: str) -> None:
    model = small(
        bias="all", norm="layernorm", position="learned", mlp="gelu", tie_embeddings=False
    )
    optimizer = Optimizer(model, OptimConfig(kind=kind, weight_decay=0.5), "cpu")
    owners = [
        (p, type(o).__name__, group["weight_decay"])
        for o in optimizer.optimizers
        for group in o.param_groups
        for p in group["params"]
    ]
    assert len(owners) == len({id(p) for p, *_ in owners}) == len(list(model.parameters()))
    for p, owner, decay in owners:
        name = optimizer.names[p]
        assert decay == (0.5 if p.dim() == 2 else 0.0), name
        muon = kind == "muon" and p.dim() == 2 and name.startswith("blocks.")
        assert owner == ("Muon" if muon else "AdamW"), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_gradient_only_weight_decay_acts(kind: str) -> None:
    model = small(bias="qkv")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = copies(dict(model.named_parameters()))
    optimizer = Optimizer(model, OptimConfig(kind=kind, weight_decay=0.5), "cpu")
    optimizer.set_learning_rate(0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name], msg=name)


def test_learning_rate_is_scaled_per_group() -> None:
    optimizer = Optimizer(small(), OptimConfig(kind="muon", embedding_lr_scale=3.0), "cpu")
    optimizer.set_learning_rate(0.01)
    rates = {type(o).__name__: {g["lr"] for g in o.param_groups} for o in optimizer.optimizers}
    assert rates == {"AdamW": {0.03}, "Muon": {0.01}}
    alone = Optimizer(small(), OptimConfig(kind="adamw", embedding_lr_scale=3.0), "cpu")
    alone.set_learning_rate(0.01)
    assert {g["lr"] for o in alone.optimizers for g in o.param_groups} == {0.01}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_round_trip_is_exact(kind: str) -> None:
    config = OptimConfig(kind=kind)
    one = small()
    first = Optimizer(one, config, "cpu")
    for step in range(3):
        fill_gradients(one, step)
        first.step()
    state = copies(first.state_tensors())
    fields = {key.rpartition("|")[2] for key in state}
    assert fields == {"exp_avg", "exp_avg_sq", "step"} | ({"momentum"} if kind == "muon" else set())

    two = small()
    two.load_state_dict(copies(one.state_dict()))
    second = Optimizer(two, config, "cpu")
    second.load_state_tensors(state)
    assert {k: v.dtype for k, v in second.state_tensors().items()} == {
        k: v.dtype for k, v in state.items()
    }
    for model, optimizer in ((one, first), (two, second)):
        fill_gradients(model, 9)
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    for key, value in first.state_tensors().items():
        assert torch.equal(value, second.state_tensors()[key]), key


def test_state_of_another_model_is_rejected() -> None:
    config = OptimConfig(kind="adamw")
    one = small()
    optimizer = Optimizer(one, config, "cpu")
    fill_gradients(one)
    optimizer.step()
    state = optimizer.state_tensors()
    wider = Optimizer(small(d_ff=32), config, "cpu")
    with pytest.raises(ValueError, match=r"mlp\.gate_up\.weight\|exp_avg' .* does not fit this"):
        wider.load_state_tensors(state)
    shallow = Optimizer(small(n_layer=1), config, "cpu")
    with pytest.raises(ValueError, match=r"blocks\.1\..* does not fit this model"):
        shallow.load_state_tensors(state)


def test_frozen_parameters_do_not_change() -> None:
    model = small()
    model.embedding.token.weight.requires_grad_(False)
    optimizer = Optimizer(model, OptimConfig(kind="muon"), "cpu")
    before = model.embedding.token.weight.clone()
    fill_gradients(model)
    model.embedding.token.weight.grad = None
    optimizer.step()
    assert torch.equal(model.embedding.token.weight, before)
    assert not any(key.startswith("embedding") for key in optimizer.state_tensors())
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2 and p.shape[0] != 20)
    Optimizer(model, OptimConfig(kind="muon"), "cpu").step()  # nothing is left for AdamW


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_of_the_state_are_about_equal(ranks: int) -> None:
    sizes = {f"{n}": size for n, size in enumerate([50, 7, 7, 7, 30, 30, 1, 1, 20, 20, 20, 7])}
    owners = share(sizes, ranks)
    assert owners.keys() == sizes.keys()
    loads = [sum(sizes[n] for n, owner in owners.items() if owner == r) for r in range(ranks)]
    # Graham's bound: 4/3 of the best, which is at least the largest one and the mean
    assert max(loads) <= 4 / 3 * max(50, sum(sizes.values()) / ranks)


def test_eager_steps_do_not_import_the_compiler() -> None:
    """It would double the time to the first step; in a process that has not imported it yet."""
    code = """
import sys, torch
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
optimizer = Optimizer(model, OptimConfig(), "cpu")
model["blocks"][0](torch.ones(4)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert len(optimizer.optimizers) == 2 and not any(p.grad is not None for p in model.parameters())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_muon_does_not_compute_in_emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """V100 and T4 have bfloat16 in software only, as PyTorch says when it is asked like that."""
    for hardware in (False, True):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, hardware=hardware: (
                including_emulation or hardware
            ),
        )  # fmt: skip
        optimizer = Optimizer(GPTModel(ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9)),
                              OptimConfig(), "cuda")  # fmt: skip
        [muon] = [each for each in optimizer.optimizers if isinstance(each, Muon)]
        assert muon.dtype == (torch.bfloat16 if hardware else torch.float32)

"""Frozen layers in 4 and 8 bits: their numbers, products and gradients, adapters beside them."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from random_weights import add_noise
from torch import Tensor, nn

from gptsmith.batch import Batch
from gptsmith.model import flops, lora, state_dict
from gptsmith.model.config import LoraConfig, ModelConfig, Quantization
from gptsmith.model.gpt import FusedLinear, GPTModel
from gptsmith.model.quantized import (
    NF4,
    QuantizedLinear,
    quantize,
    quantized_layers,
    replace_linears,
    restore_linears,
)
from gptsmith.train.loss import next_token_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = pytest.mark.parametrize("format", get_args(Quantization))
V = 50
CONFIG = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=48, d_ff=40, vocab_size=V, context_length=16
)
GPT2 = CONFIG.change(norm="layernorm", mlp="gelu", position="learned", bias="all")
IDS = torch.randint(V, (3, 10), generator=torch.Generator().manual_seed(1))


def layer(
    format: Quantization, rows: int = 40, columns: int = 70, bias: bool = True
) -> QuantizedLinear:
    """A layer whose last block is not full."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias)
    made = QuantizedLinear(linear, format)
    made.set_weight(linear.weight)
    return made.requires_grad_(False)


def make(config: ModelConfig = CONFIG) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    add_noise(model, 0.1)
    return model


def test_nf4_is_that_of_bitsandbytes() -> None:
    """Codes and scales that bitsandbytes 0.50.2's quantize_4bit makes of the same numbers."""
    numbers = torch.arange(150, dtype=torch.float32)
    weight = ((numbers * 7919) % 2003 - 1001) / 1024
    codes, scales = quantize(weight.view(5, 30), "nf4")
    assert codes.flatten()[:75].numpy().tobytes().hex() == (
        "0feeddcba9876543221100ffeedccba9765433211100feeddcba9876543221100ffeeddcba97"
        "65433211100feeedcba9876543221100ffeeddcba9865443211100feeedcba987654322110"
    )
    assert scales.tolist() == [0.9775390625, 0.9638671875, 0.95703125]


@FORMATS
def test_error_is_that_of_the_nearest_level(format: Quantization) -> None:
    torch.manual_seed(1)
    weight = torch.randn(64, 128)
    made = QuantizedLinear(nn.Linear(128, 64), format)
    made.set_weight(weight)
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4) if format == "nf4" else torch.arange(-127, 128) / 127
    nearest = (blocks.unsqueeze(2) - largest.unsqueeze(2) * levels).abs().amin(dim=2)
    torch.testing.assert_close(
        (made.weight.view(-1, 64) - blocks).abs(), nearest, rtol=0, atol=1e-6
    )


@FORMATS
def test_quantized_weights_are_quantized_to_themselves(format: Quantization) -> None:
    made, again = layer(format), layer(format)
    again.set_weight(made.weight)
    assert torch.equal(again.codes, made.codes)
    assert torch.equal(again.weight, made.weight)


@FORMATS
def test_a_block_of_zeros_stays_zero(format: Quantization) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = 1e-42
    made = QuantizedLinear(nn.Linear(64, 2), format)
    made.set_weight(weight)
    assert torch.equal(made.weight[0], weight[0])
    assert made.weight.isfinite().all()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_weight(
    format: Quantization, dtype: torch.dtype
) -> None:
    made = layer(format)
    x = torch.randn(2, 3, 70, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    y = made(x)
    expected = F.linear(other, made.weight.to(dtype), made.bias.to(dtype))
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, other.grad)


@FORMATS
def test_autocast_decides_the_dtype(format: Quantization) -> None:
    x = torch.randn(2, 70)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(format)(x).dtype == torch.bfloat16
    assert layer(format)(x).dtype == torch.float32


@FORMATS
def test_backward_pass_keeps_no_weight(format: Quantization) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(format)(torch.randn(2, 70, requires_grad=True))
    assert sum(t.nbytes for t in kept) < 40 * 70 * 2


@FORMATS
@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["llama", "gpt2"])
def test_layers_of_the_blocks_are_replaced_and_restored(
    config: ModelConfig, format: Quantization
) -> None:
    model = make(config)
    kinds = {name: type(m) for name, m in model.named_modules()}
    names, plain = list(model.state_dict()), model(IDS)
    replace_linears(model, format)
    assert len([*quantized_layers(model)]) == 4 * config.n_layer
    quantized = model(IDS)
    size = (plain - quantized).std() / plain.std()
    assert 0 < size < (0.02 if format == "int8" else 0.3)
    again = state_dict.load(config, model.state_dict(), "stored", quantized=format).eval()
    assert torch.equal(again(IDS), quantized)
    restore_linears(model)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == names
    assert torch.equal(model(IDS), quantized)
    qkv = model.get_submodule("blocks.0.attention.qkv")
    assert isinstance(qkv, FusedLinear)
    assert len(qkv.fused_rows) == 3


@FORMATS
def test_tensors_are_quantized_as_they_are_read(format: Quantization) -> None:
    model = make()
    stored = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    read = state_dict.load_in_fp32(CONFIG, stored, "file", quantize=format).eval()
    whole = state_dict.load(CONFIG, stored, "file").float().eval()
    replace_linears(whole, format)
    assert torch.equal(read(IDS), whole(IDS))
    plain = state_dict.load_in_fp32(CONFIG, stored, "file")
    assert all(torch.equal(t, stored[n].float()) for n, t in plain.state_dict().items())
    del stored["blocks.0.mlp.down.weight"]
    with pytest.raises(
        ValueError, match=r"file does not fit .*blocks\.0\.mlp\.down\.weight is miss"
    ):
        state_dict.load_in_fp32(CONFIG, stored, "file", quantize=format)


@FORMATS
@pytest.mark.parametrize("targets", [(), ("qkv", "down")], ids=["all", "two"])
def test_adapters_are_trained_and_merged(format: Quantization, targets: tuple[str, ...]) -> None:
    model = make()
    replace_linears(model, format)
    start = model(IDS)
    lora.attach(model, LoraConfig(rank=4, targets=targets), [49, 3])
    assert torch.equal(model(IDS), start)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    codes = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch, losses = Batch(IDS[:, :-1], IDS[:, 1:].clone()), []
    for recompute in [False] * 5 + [True] * 5:
        model.train().activation_checkpointing = recompute
        loss = next_token_loss(model, batch) / batch.count
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert {n.rpartition(".")[2] for n in trained} == {"lora_A", "lora_B", "rows"}
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers())
    attached = model.eval()(IDS)
    copy = GPTModel(CONFIG).eval()
    copy.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(copy(IDS), attached, rtol=1e-5, atol=1e-5)
    copy.load_state_dict(lora.merged_state_dict(model, adapters=False))
    assert (copy(IDS) - attached).abs().max() > 0.1
    lora.merge(model)
    assert not [*quantized_layers(model)]
    assert list(model.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(model(IDS), attached, rtol=1e-5, atol=1e-5)


@FORMATS
def test_memory_is_what_the_formula_says(format: Quantization) -> None:
    config = CONFIG.change(n_embd=64)
    model = make(config)
    replace_linears(model, format)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert stored == flops.weight_bytes(config, format)
    assert flops.weight_bytes(config) == 4 * flops.parameters(config)

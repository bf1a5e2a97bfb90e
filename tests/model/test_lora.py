"""Adapters on small models of both families. Their form on disk: tests/interop/test_peft.py."""

import pytest
import torch
from random_weights import add_noise
from torch import nn

from gptsmith.batch import Batch
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import (
    LoraConfig,
    LoraLinear,
    attach,
    freeze,
    merge,
    train_token_rows,
    trainable_summary,
)
from gptsmith.train.loss import next_token_loss

V = 50
SIZES = dict(n_layer=2, n_head=4, n_embd=32, d_ff=48, vocab_size=V, context_length=16)
GPT2 = ModelConfig(
    **SIZES, norm="layernorm", mlp="gelu", position="learned", bias="all", dropout=0.1
)
QWEN3 = ModelConfig(**SIZES, n_kv_head=2, qk_norm=True)
UNTIED = QWEN3.change(tie_embeddings=False)
CONFIGS = pytest.mark.parametrize("config", [GPT2, QWEN3, UNTIED], ids=["gpt2", "qwen3", "untied"])
IDS = torch.randint(V, (3, 10), generator=torch.Generator().manual_seed(1))
NEW = [49, 3, 7]


def make(config: ModelConfig) -> GPTModel:
    torch.manual_seed(0)
    model = (GPTClassifier if config.labels else GPTModel)(config).eval()
    add_noise(model, 0.1)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@CONFIGS
def test_merged_equals_attached(config: ModelConfig) -> None:
    model = make(config)
    names, plain = list(model.state_dict()), model(IDS)
    attach(model, LoraConfig(rank=4, alpha=8, dropout=0.5), NEW)
    assert torch.equal(model(IDS), plain)  # B is zero, the rows are what they were
    add_noise(model, 0.1)
    attached = model(IDS)
    assert (attached - plain).abs().max() > 0.5
    with torch.inference_mode():  # here rows are written into their table, not copied with it
        torch.testing.assert_close(model(IDS), attached, rtol=1e-6, atol=1e-6)
    merge(model)
    torch.testing.assert_close(model(IDS), attached, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert trained_names(model) == set(dict(model.named_parameters()))
    again = GPTModel(config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS), model(IDS))


@CONFIGS
def test_only_adapters_and_new_rows_change_in_training(config: ModelConfig) -> None:
    model = make(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, LoraConfig(rank=2, dropout=0.1), NEW)
    add_noise(model, 0.01)
    rows = {"embedding.token.rows"} | ({"head.rows"} if not config.tie_embeddings else set())
    assert {n for n in trained_names(model) if ".lora_" not in n} == rows
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    model.train()
    losses = []
    batch = Batch(torch.cat([IDS, torch.tensor([NEW]).T], dim=1)[:, :-1], IDS.clone())
    for _ in range(10):
        loss = next_token_loss(model, batch)
        (loss / batch.count).backward()
        losses.append(float((loss / batch.count).detach()))
        for name in trained_names(model):
            assert model.get_parameter(name).grad.abs().max() > 0, name
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    for name, tensor in model.state_dict().items():
        plain = name.replace(".base.", ".")
        if plain in before:
            other = [i for i in range(V) if i not in NEW] if "token" in name else ...
            assert torch.equal(tensor[other], before[plain][other]), name
    merge(model)
    for name, tensor in model.state_dict().items():
        if name in ("embedding.token.weight", "head.weight"):
            assert {int(i) for i in (tensor != before[name]).any(dim=1).nonzero()} == set(NEW)


def test_adapter_adds_the_scaled_product_of_b_and_a() -> None:
    linear = nn.Linear(6, 5)
    wrapped = LoraLinear(linear, LoraConfig(rank=3, alpha=12))
    nn.init.normal_(wrapped.lora_B)
    x = torch.randn(4, 6)
    weight = linear.weight + 12 / 3 * wrapped.lora_B @ wrapped.lora_A
    torch.testing.assert_close(wrapped(x), x @ weight.T + linear.bias)
    bound = (1 / 6) ** 0.5  # kaiming uniform with a = sqrt(5)
    assert 0.5 * bound < wrapped.lora_A.abs().max() <= bound


def test_targets_choose_the_layers() -> None:
    model = make(QWEN3)
    attach(model, LoraConfig(rank=2, targets=("qkv", "down")))
    layers = {name.split(".", 2)[2].rpartition(".")[0] for name in trained_names(model)}
    assert layers == {"attention.qkv", "mlp.down"}
    with pytest.raises(
        ValueError, match=r"lora\.targets has 'up': .* are qkv, proj, gate_up, down$"
    ):
        attach(make(QWEN3), LoraConfig(rank=2, targets=("qkv", "up")))
    attach(make(GPT2), LoraConfig(rank=2, targets=("up",)))


def test_a_classifier_keeps_its_head_trained() -> None:
    model = make(QWEN3.change(labels=("no", "yes")))
    lengths = torch.tensor([10, 4, 7])
    attach(model, LoraConfig(rank=2), NEW)
    assert {n for n in trained_names(model) if ".lora_" not in n} == {
        "score.weight", "embedding.token.rows",
    }  # fmt: skip
    add_noise(model, 0.1)
    attached = model.logits(IDS, lengths)
    merge(model)
    torch.testing.assert_close(model.logits(IDS, lengths), attached, rtol=1e-5, atol=1e-5)


@CONFIGS
def test_generation_with_attached_adapters_is_that_of_the_merged_model(
    config: ModelConfig,
) -> None:
    """With the KV cache, token by token, and while gradients of a training step are alive."""
    model = make(config)
    attach(model, LoraConfig(rank=4), NEW)
    add_noise(model, 0.1)
    model.train()
    loss = next_token_loss(model, Batch(IDS[:, :-1], IDS[:, 1:]))
    sampling = SamplingConfig(max_new_tokens=6, temperature=0)
    prompts = [[1, 49], [2, 3, 4, 7]]
    attached = [g.ids for g in Engine(model).generate(prompts, sampling)]
    loss.backward()
    merge(model)
    assert [g.ids for g in Engine(model).generate(prompts, sampling)] == attached


# torch makes such an object itself when it traces one of ours
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_step_with_adapters_compiles_to_one_graph() -> None:
    model = make(UNTIED)
    attach(model, LoraConfig(rank=2), NEW)
    batch = Batch(IDS[:, :-1], IDS[:, 1:])
    compiled = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True)
    compiled(model, batch).backward()
    grads = {name: model.get_parameter(name).grad.clone() for name in trained_names(model)}
    model.zero_grad()
    next_token_loss(model, batch).backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_new_rows_are_trained_in_frozen_tables() -> None:
    model = make(UNTIED)
    freeze(model, ["embedding.*", "blocks.0.*", "*_norm.weight"])
    assert trained_names(model) == {
        "blocks.1.attention.qkv.weight", "blocks.1.attention.proj.weight",
        "blocks.1.mlp.gate_up.weight", "blocks.1.mlp.down.weight", "head.weight",
    }  # fmt: skip
    plain = model(IDS)
    train_token_rows(model, NEW)
    assert torch.equal(model(IDS), plain)
    rest = trained_names(model)
    assert "embedding.token.rows" in rest
    assert "head.weight" in rest  # trained whole, new rows included
    add_noise(model, 0.1)
    attached = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), attached, rtol=1e-5, atol=1e-5)


def test_without_new_tokens_no_row_is_wrapped() -> None:
    model = make(QWEN3)
    freeze(model, ["embedding.*"])
    train_token_rows(model, [])
    assert isinstance(model.embedding.token, nn.Embedding)
    merge(model)  # nothing is attached: only what was frozen is trained again
    assert trained_names(model) == set(dict(model.named_parameters()))


def test_useless_freeze_patterns_are_rejected() -> None:
    model = make(QWEN3)
    with pytest.raises(ValueError, match=r"'block\.\*' matches no parameter of .*embedding\.token"):
        freeze(model, ["embedding.*", "block.*"])
    with pytest.raises(ValueError, match=r"\['\*'\] leaves nothing to train"):
        freeze(model, ["*"])


@pytest.mark.parametrize("token_ids", [[3, 3], [V], [-1]])
def test_invalid_token_ids_are_rejected(token_ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"token ids .* give each once, in 0\.\.49"):
        attach(make(GPT2), LoraConfig(rank=2), token_ids)


def test_summary_of_trainable_parameters() -> None:
    model = make(QWEN3)
    total = sum(p.numel() for p in model.parameters())
    assert trainable_summary(model) == f"{total:,} of {total:,} parameters are trained (100.0%)"
    freeze(model, ["embedding.*"])
    some = total - V * 32
    assert (
        trainable_summary(model)
        == f"{some:,} of {total:,} parameters are trained ({some / total:.1%})"
    )

"""Our network computes what the stock classes of transformers compute: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.gpt import GPTModel
from gptsmith.train.loss import IGNORE, Batch, next_token_loss

B, T, V = 3, 20, 97

# name here -> names there; several there are the rows of one matrix here
GPT2_BLOCK = {
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.proj": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
LLAMA_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.proj": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
}


def from_gpt2(tensors: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    ours = {
        "embedding.token.weight": tensors["transformer.wte.weight"],
        "embedding.position.weight": tensors["transformer.wpe.weight"],
        "final_norm.weight": tensors["transformer.ln_f.weight"],
        "final_norm.bias": tensors["transformer.ln_f.bias"],
    }
    for i in range(n_layer):
        for name, (part,) in GPT2_BLOCK.items():
            for kind in ("weight", "bias"):
                x = tensors[f"transformer.h.{i}.{part}.{kind}"]
                ours[f"blocks.{i}.{name}.{kind}"] = x.T if x.dim() == 2 else x  # Conv1D
    return ours


def from_llama(tensors: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    ours = {
        "embedding.token.weight": tensors["model.embed_tokens.weight"],
        "final_norm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        ours["head.weight"] = tensors["lm_head.weight"]
    gated = any("gate_proj" in name for name in tensors)
    for i in range(n_layer):
        for name, parts in LLAMA_BLOCK.items():
            if name == ("mlp.up" if gated else "mlp.gate_up"):
                continue
            for kind in ("weight", "bias"):
                there = [f"model.layers.{i}.{part}.{kind}" for part in parts]
                if there[0] in tensors:
                    ours[f"blocks.{i}.{name}.{kind}"] = torch.cat([tensors[n] for n in there])
    return ours


SIZES = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)
LLAMA = dict(
    SIZES, vocab_size=V, max_position_embeddings=32, num_key_value_heads=2, rms_norm_eps=1e-6
)
OURS = dict(
    n_layer=2, n_head=4, n_embd=32, d_ff=48, n_kv_head=2, vocab_size=V, context_length=32,
    norm_eps=1e-6,
)  # fmt: skip
# The four pairs of a head of 8 turn 10.2, 3.2, 1.02 and 0.3 times in 64 positions: one stays, two
# lie on the ramp, one is divided.
STRETCH = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
ORIGINAL = dict(original_max_position_embeddings=64)

CASES = {
    "gpt2": (
        "GPT2LMHeadModel",
        dict(n_layer=2, n_head=4, n_embd=32, n_positions=32, vocab_size=V),
        dict(
            OURS,
            n_kv_head=4,
            d_ff=128,
            norm="layernorm",
            norm_eps=1e-5,
            mlp="gelu",
            position="learned",
            bias="all",
        ),
    ),
    "llama": ("LlamaForCausalLM", dict(LLAMA, tie_word_embeddings=False), dict(OURS, tied=False)),
    "llama tied, equal heads": (
        "LlamaForCausalLM",
        dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
        dict(OURS, n_kv_head=4),
    ),
    "llama linear": (
        "LlamaForCausalLM",
        dict(
            LLAMA,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0),
        ),
        dict(OURS, rope_theta=500.0, rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    ),
    "llama3": (
        "LlamaForCausalLM",
        dict(
            LLAMA,
            tie_word_embeddings=True,
            rope_parameters=dict(STRETCH, **ORIGINAL, rope_type="llama3", rope_theta=100.0),
        ),
        dict(
            OURS,
            rope_theta=100.0,
            rope_scaling=RopeScaling(rope_type="llama3", **STRETCH, **ORIGINAL),
        ),
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        dict(LLAMA, head_dim=16, tie_word_embeddings=True),
        dict(OURS, head_dim=16, qk_norm=True),
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        dict(LLAMA, tie_word_embeddings=False),
        dict(OURS, bias="qkv", tied=False),
    ),
    "arcee": (
        "ArceeForCausalLM",
        dict(LLAMA, head_dim=8, tie_word_embeddings=False),
        dict(OURS, mlp="relu2", tied=False),
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Weights, biases and norms of a size that makes every one of them matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.25 * torch.randn(p.shape, generator=generator)
            p.copy_(noise + (p.dim() == 1 and name.endswith("weight")))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case: str) -> None:
    name, there, here = CASES[case]
    stock = getattr(transformers, name)
    theirs = stock(stock.config_class(**there)).eval()
    randomize(theirs)
    ours = GPTModel(ModelConfig(**here)).eval()
    move = from_gpt2 if name == "GPT2LMHeadModel" else from_llama
    ours.load_state_dict(move(dict(theirs.named_parameters()), 2))

    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, :7] = IGNORE
    expected = theirs(inputs).logits
    logits = ours(inputs)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    summed, scored = next_token_loss(ours, Batch(inputs, targets))
    (summed / scored).backward()
    torch.testing.assert_close(summed / scored, loss, rtol=1e-6, atol=1e-6)
    grads = move({n: p.grad for n, p in theirs.named_parameters()}, 2)
    for name, p in ours.named_parameters():
        assert grads[name].abs().max() > 1e-4, name
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)

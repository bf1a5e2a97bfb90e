"""Models of transformers, paired with ours of the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from random_weights import randomize
from small_configs import GPT2 as SMALL_GPT2
from small_configs import LLAMA as SMALL_LLAMA
from torch import Tensor

from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.gpt import GPTModel

V = 97

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


def heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"lm_head.weight": "head.weight", "score.weight": "score.weight"}
    return {ours: tensors[there] for there, ours in names.items() if there in tensors}


def from_gpt2(tensors: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    ours = {
        "embedding.token.weight": tensors["transformer.wte.weight"],
        "embedding.position.weight": tensors["transformer.wpe.weight"],
        "final_norm.weight": tensors["transformer.ln_f.weight"],
        "final_norm.bias": tensors["transformer.ln_f.bias"],
    }
    ours.update(heads(tensors))
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
    ours.update(heads(tensors))
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
    "llama": (
        "LlamaForCausalLM",
        dict(LLAMA, tie_word_embeddings=False),
        dict(OURS, tie_embeddings=False),
    ),
    "llama tied, equal heads": (
        "LlamaForCausalLM",
        dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
        dict(OURS, n_kv_head=4),
    ),
    "llama biased": (
        "LlamaForCausalLM",
        dict(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        dict(OURS, bias="all"),
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
        dict(OURS, bias="qkv", tie_embeddings=False),
    ),
    "arcee": (
        "ArceeForCausalLM",
        dict(LLAMA, head_dim=8, tie_word_embeddings=False),
        dict(OURS, mlp="relu2", tie_embeddings=False),
    ),
}


@pytest.fixture(params=[SMALL_LLAMA, SMALL_GPT2], ids=["llama", "gpt2"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


@dataclass
class Pair:
    """The same network twice, and the way of its tensors (weights, gradients) to our names."""

    theirs: Any
    ours: GPTModel
    move: Callable[[dict[str, Tensor], int], dict[str, Tensor]]


@pytest.fixture(scope="session")
def stock() -> Callable[..., Pair]:
    def pair(case: str, labels: tuple[str, ...] = (), **changes: Any) -> Pair:
        """The case by name, with random weights; with labels as a classifier. changes: ours."""
        import transformers

        name, there, here = CASES[case]
        if labels:
            name = name.replace("LMHeadModel", "ForCausalLM")
            name = name.replace("ForCausalLM", "ForSequenceClassification")
            there = dict(there, num_labels=len(labels), pad_token_id=0)
        theirs = getattr(transformers, name)
        theirs = theirs(theirs.config_class(**there)).eval()
        randomize(theirs)
        config = ModelConfig(**{**here, **changes}, labels=labels)
        ours = (GPTClassifier if labels else GPTModel)(config).eval()
        move = from_gpt2 if name.startswith("GPT2") else from_llama
        ours.load_state_dict(move(dict(theirs.named_parameters()), config.n_layer))
        return Pair(theirs, ours, move)

    return pair

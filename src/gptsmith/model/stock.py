"""Which stock class of transformers computes an architecture, and what it calls our modules."""

from __future__ import annotations

from dataclasses import dataclass

from gptsmith.model.config import ModelConfig


def stock_class(c: ModelConfig) -> str:
    """The class of transformers that computes this architecture.

    Raises ValueError naming the axis in which the nearest class differs.
    """
    family, wanted = _nearest(c)
    for axis, value in wanted.items():
        if getattr(c, axis) != value:
            raise ValueError(
                f"no stock class of transformers has {axis} {getattr(c, axis)!r} beside the rest: "
                f"{family}, the nearest, has {value!r}"
            )
    if c.labels:
        return f"{family}ForSequenceClassification"
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


def _nearest(c: ModelConfig) -> tuple[str, dict[str, object]]:
    """A family of classes, and the axes on which it leaves no choice."""
    wanted: dict[str, object] = dict(norm="rmsnorm", mlp="swiglu", mask="causal()")
    if c.position == "learned":
        wanted.update(norm="layernorm", mlp="gelu", bias="all", qk_norm=False)
        return "GPT2", {**wanted, "n_kv_head": c.n_head, "head_dim": c.n_embd // c.n_head}
    if c.mlp == "relu2":
        return "Arcee", {**wanted, "mlp": "relu2", "bias": "none", "qk_norm": False}
    if c.qk_norm:
        return "Qwen3", {**wanted, "bias": "none"}
    if c.bias == "qkv":
        return "Qwen2", {**wanted, "head_dim": c.n_embd // c.n_head}
    return "Llama", wanted


@dataclass(frozen=True)
class Names:
    """What our modules are called elsewhere.

    linears: linear layer of a block here -> its parts there, in the order of our rows.
    """

    blocks: str
    embedding: str
    head: str
    linears: dict[str, tuple[str, ...]]


_LLAMA = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.proj": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
}
GPT2_NAMES = Names(
    "transformer.h",
    "transformer.wte",
    "lm_head",
    {
        "attention.qkv": ("attn.c_attn",),
        "attention.proj": ("attn.c_proj",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
)
LLAMA_NAMES = Names("model.layers", "model.embed_tokens", "lm_head", _LLAMA)  # Qwen, Arcee as well
OWN_NAMES = Names("blocks", "embedding.token", "head", {name: (name,) for name in _LLAMA})

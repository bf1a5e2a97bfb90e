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
    if family in ("Llama", "Arcee") and c.n_embd % c.n_head:
        raise ValueError(
            f"no stock class of transformers has n_embd {c.n_embd} beside n_head {c.n_head}: "
            f"{family}, the nearest, wants a multiple of it, whatever head_dim is"
        )
    if c.labels:
        return f"{family}ForSequenceClassification"
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


def _nearest(c: ModelConfig) -> tuple[str, dict[str, object]]:
    """A family of classes, and the axes on which it leaves no choice."""
    wanted: dict[str, object] = dict(norm="rmsnorm", mlp="swiglu", mask="causal()")
    if c.position == "learned":
        wanted.update(norm="layernorm", bias="all", qk_norm=False)
        wanted["mlp"] = c.mlp if c.mlp == "gelu_erf" else "gelu"
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
    norms: of a block; transposed: whether the matrices of a block are (in, out) there.
    """

    blocks: str
    embedding: str
    position: str
    final_norm: str
    head: str
    linears: dict[str, tuple[str, ...]]
    norms: dict[str, str]
    transposed: bool = False


GPT2_NAMES = Names(
    "transformer.h",
    "transformer.wte",
    "transformer.wpe",
    "transformer.ln_f",
    "lm_head",
    {
        "attention.qkv": ("attn.c_attn",),
        "attention.proj": ("attn.c_proj",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    transposed=True,
)
LLAMA_NAMES = Names(  # Qwen and Arcee as well
    "model.layers",
    "model.embed_tokens",
    "",
    "model.norm",
    "lm_head",
    {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.proj": ("self_attn.o_proj",),
        "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.up": ("mlp.up_proj",),
        "mlp.down": ("mlp.down_proj",),
    },
    {
        "attention_norm": "input_layernorm",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
    },
)
OWN_NAMES = Names(
    "blocks",
    "embedding.token",
    "embedding.position",
    "final_norm",
    "head",
    {name: (name,) for name in LLAMA_NAMES.linears},
    {name: name for name in LLAMA_NAMES.norms},
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours is stored: its parts there, in the order of our rows.

    rows: of each part, here; transposed: each part is (columns, rows) there.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False


def place(c: ModelConfig, ours: str, rows: int) -> Place:
    """Where the stock class of `c` has the tensor `ours` of a state_dict, of so many rows."""
    names = GPT2_NAMES if c.position == "learned" else LLAMA_NAMES
    top = {
        "embedding.token": names.embedding,
        "embedding.position": names.position,
        "final_norm": names.final_norm,
        "head": names.head,
        "score": "score",
    }
    module, _, kind = ours.rpartition(".")  # weight or bias
    if module in top:
        return Place((f"{top[module]}.{kind}",), (rows,))
    _, layer, module = module.split(".", 2)
    block = f"{names.blocks}.{layer}"
    if module in names.norms:
        return Place((f"{block}.{names.norms[module]}.{kind}",), (rows,))
    parts = tuple(f"{block}.{part}.{kind}" for part in names.linears[module])
    split = (c.n_head * c.D, c.K * c.D, c.K * c.D) if len(parts) == 3 else (c.F, c.F)
    heights = split if len(parts) > 1 else (rows,)
    return Place(parts, heights, names.transposed and kind == "weight")

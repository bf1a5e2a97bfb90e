"""Classes of transformers with the weights of a solution."""

from __future__ import annotations

import importlib.util
from typing import Any

# The course's name of a weight in a block -> transformers' names; several are its rows in order.
_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.query": ("self_attn.q_proj",),
    "attention.key": ("self_attn.k_proj",),
    "attention.value": ("self_attn.v_proj",),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.up": ("mlp.up_proj", "mlp.gate_proj"),  # main, gate
    "feed_forward.down": ("mlp.down_proj",),
}


def transformers_is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def llama(model: Any, sizes: dict[str, int]) -> Any:
    """LlamaForCausalLM with the weights of the course's GPTModel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["n_embd"],
        intermediate_size=4 * sizes["n_embd"], num_hidden_layers=sizes["n_layer"],
        num_attention_heads=sizes["n_head"], max_position_embeddings=sizes["context_length"],
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["embedding.token.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(sizes["n_layer"]):
        for name, parts in _BLOCK.items():
            rows = ours[f"blocks.{i}.{name}.weight"].chunk(len(parts))
            for part, weight in zip(parts, rows, strict=True):
                theirs[f"model.layers.{i}.{part}.weight"] = weight
    stock = LlamaForCausalLM(config).eval()
    stock.load_state_dict(theirs)
    return stock

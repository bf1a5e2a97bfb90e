"""Small models that fit every quantization of GGUF (rows of a multiple of 32), and what a GGUF
holds, read by the package gguf and put into the form of our state dict."""

from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.model.config import ModelConfig, RopeScaling

SIZES: dict[str, Any] = dict(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=64, head_dim=32, d_ff=96, context_length=64,
    vocab_size=264, norm_eps=1e-6,
)  # fmt: skip
GPT2: dict[str, Any] = dict(
    SIZES, n_kv_head=4, head_dim=16, norm="layernorm", mlp="gelu", position="learned", bias="all"
)
LLAMA3 = RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=64)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the only GGUF in a folder, and its tensors."""
    (path,) = folder.glob("*.gguf")
    from gguf import GGUFReader

    file = GGUFReader(path)
    keys = {name: field.contents() for name, field in file.fields.items()}
    return keys, {tensor.name: tensor for tensor in file.tensors}


def numbers(tensor: Any) -> np.ndarray:
    from gguf import quants

    return quants.dequantize(tensor.data, tensor.tensor_type)


def apart(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads in which pairs are neighbours, put into the order in which they are D/2 apart.
    Written index by index, unlike the export."""
    D = len(x) // heads
    rows = [h * D + 2 * i + j for h in range(heads) for j in (0, 1) for i in range(D // 2)]
    return x[rows]


def ours_from(tensors: dict[str, Any], config: ModelConfig, neighbours: bool) -> dict[str, Any]:
    """Our state dict from the tensors of a GGUF."""
    names = {
        "token_embd": "embedding.token", "position_embd": "embedding.position",
        "output_norm": "final_norm", "output": "head", "attn_norm": "attention_norm",
        "attn_qkv": "attention.qkv", "attn_output": "attention.proj", "ffn_norm": "mlp_norm",
        "attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm", "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
    }  # fmt: skip
    ours, values = {}, {name: numbers(tensor) for name, tensor in tensors.items()}
    for name in list(values):
        *block, part, kind = name.split(".")
        where = f"blocks.{block[1]}." if block else ""
        there = name.removesuffix(f"{part}.{kind}")
        if part == "attn_q":
            q, k, v = (values[f"{there}attn_{x}.{kind}"] for x in "qkv")
            if neighbours:
                q, k = apart(q, config.n_head), apart(k, config.K)
            ours[f"{where}attention.qkv.{kind}"] = np.concatenate((q, k, v))
        elif part == "ffn_gate":
            both = [values[f"{there}{x}.{kind}"] for x in ("ffn_gate", "ffn_up")]
            ours[f"{where}mlp.gate_up.{kind}"] = np.concatenate(both)
        elif part in names and not (part == "ffn_up" and f"{there}ffn_gate.{kind}" in values):
            ours[f"{where}{names[part]}.{kind}"] = values[name]
    return ours

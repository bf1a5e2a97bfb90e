"""Small models that fit every quantisation of GGUF: rows of a multiple of 32."""

from typing import Any

from gptsmith.model.config import RopeScaling

SIZES: dict[str, Any] = dict(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=64, head_dim=32, d_ff=96, context_length=64,
    vocab_size=264, norm_eps=1e-6,
)  # fmt: skip
GPT2: dict[str, Any] = dict(
    SIZES, n_kv_head=4, head_dim=16, norm="layernorm", mlp="gelu", position="learned", bias="all"
)
LLAMA3 = RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=64)

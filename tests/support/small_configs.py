"""Two small architectures that differ in every axis."""

from gptsmith.model.config import ModelConfig

SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=20, context_length=8)
LLAMA = ModelConfig(**SIZES, n_kv_head=2, qk_norm=True)
GPT2 = ModelConfig(**SIZES, norm="layernorm", mlp="gelu", position="learned", bias="all")

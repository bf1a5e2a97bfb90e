"""Small models of transformers for every class that we import, with random weights."""

from pathlib import Path
from typing import Any

import transformers
from random_weights import randomize

from gptsmith.tokenizer import Tokenizer

V, T = 64, 32
TOKENIZER = Tokenizer.char(["".join(map(chr, range(48, 48 + V - 1)))])  # V with <|endoftext|>

GPT2 = dict(n_layer=2, n_head=4, n_embd=32, n_positions=T, vocab_size=V)
LLAMA = dict(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
    intermediate_size=48, vocab_size=V, max_position_embeddings=T, pad_token_id=None,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
STRETCH = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "distilgpt2": ("GPT2", dict(GPT2, n_layer=1, n_inner=48)),
    "gpt2 untied": ("GPT2", dict(GPT2, tie_word_embeddings=False)),
    "llama": ("Llama", LLAMA),
    "llama tied": ("Llama", dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True)),
    "llama wide heads": ("Llama", dict(LLAMA, head_dim=16)),
    "llama biased": ("Llama", dict(LLAMA, attention_bias=True, mlp_bias=True)),
    "llama attention biased": ("Llama", dict(LLAMA, attention_bias=True)),
    "llama mlp biased": ("Llama", dict(LLAMA, mlp_bias=True)),
    "llama linear": ("Llama", dict(LLAMA, rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=500.0))),
    "llama3": ("Llama", dict(LLAMA, rope_parameters=STRETCH)),
    "qwen2": ("Qwen2", dict(LLAMA, tie_word_embeddings=True)),
    "qwen3 tied": ("Qwen3", dict(LLAMA, head_dim=16, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=16)),
    "arcee": ("Arcee", LLAMA),
}  # fmt: skip


def transformers_model(case: str, labels: int = 0) -> Any:
    """A model of transformers in eval mode, with random weights."""
    family, fields = CASES[case]
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    cls = getattr(transformers, family + ("ForSequenceClassification" if labels else kind))
    more = dict(num_labels=labels, pad_token_id=V - 1) if labels else {}
    model = cls(cls.config_class(**{**fields, **more})).eval()
    randomize(model)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    TOKENIZER.save(folder / "tokenizer.json")
    return folder

"""What the tests that need a GPU share: the device, their marks, and small models."""

import os

import pytest
import torch
from random_weights import randomize

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import runtime

DEVICE = os.environ.get("GPTSMITH_TEST_DEVICE", "cuda")
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
    # torch's own, while it compiles; and its advice on fp32, which these comparisons do not want
    pytest.mark.filterwarnings("ignore:.*(torch.jit|should not be inst):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
needs_fp8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.is_available() and not runtime.has_fp8(torch.device("cuda")),
    reason="needs a GPU with FP8",
)

T, V = 128, 300
SIZES = dict(n_layer=2, n_head=4, n_embd=64, context_length=T, vocab_size=V)
GPT2 = dict(norm="layernorm", mlp="gelu", position="learned", bias="all")
AXES = {
    "llama": {},
    "gpt2": GPT2,
    "grouped": dict(n_kv_head=2, qk_norm=True),
    "window": dict(mask="causal() & sliding_window(40)"),
    "grouped window": dict(n_kv_head=1, mask="causal() & sliding_window(40)"),
    "look-ahead": dict(mask="prefix(20)"),
    "small heads": dict(n_head=8, mask="causal() & sliding_window(40)"),  # D = 8
}


def model_of(axes: dict[str, object], device: str = "cpu") -> GPTModel:
    model = GPTModel(ModelConfig(**{**SIZES, **axes}))
    randomize(model, size=0.1)
    return model.to(device)

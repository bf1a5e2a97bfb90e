"""gptsmith: a small GPT through its whole life, from raw text to export.

    import gptsmith

    run = gptsmith.load("runs/shakespeare")
    print(run.generate("To be", max_new_tokens=50))

The names below are loaded on first use: `import gptsmith` costs nothing (docs/library.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptsmith.api import LoadedRun, finetune, load, pretrain
    from gptsmith.batch import Batch
    from gptsmith.data.dataset import Windows
    from gptsmith.data.shards import Corpus
    from gptsmith.generate.chat import Chat
    from gptsmith.generate.engine import Engine
    from gptsmith.generate.options import SamplingConfig
    from gptsmith.generate.request import Generation, Request
    from gptsmith.model import masks
    from gptsmith.model.config import ModelConfig
    from gptsmith.model.gpt import (
        FeedForward,
        GPTModel,
        MultiHeadAttention,
        RMSNorm,
        SwiGLU,
        TokenEmbedding,
        TransformerBlock,
    )
    from gptsmith.model.kv_cache import KVCache
    from gptsmith.model.masks import Mask
    from gptsmith.run import Run
    from gptsmith.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Batch": "gptsmith.batch",
    "Chat": "gptsmith.generate.chat",
    "Corpus": "gptsmith.data.shards",
    "Engine": "gptsmith.generate.engine",
    "FeedForward": "gptsmith.model.gpt",
    "GPTModel": "gptsmith.model.gpt",
    "Generation": "gptsmith.generate.request",
    "KVCache": "gptsmith.model.kv_cache",
    "LoadedRun": "gptsmith.api",
    "Mask": "gptsmith.model.masks",
    "ModelConfig": "gptsmith.model.config",
    "MultiHeadAttention": "gptsmith.model.gpt",
    "RMSNorm": "gptsmith.model.gpt",
    "Request": "gptsmith.generate.request",
    "Run": "gptsmith.run",
    "SamplingConfig": "gptsmith.generate.options",
    "SwiGLU": "gptsmith.model.gpt",
    "TokenEmbedding": "gptsmith.model.gpt",
    "Tokenizer": "gptsmith.tokenizer",
    "TransformerBlock": "gptsmith.model.gpt",
    "Windows": "gptsmith.data.dataset",
    "finetune": "gptsmith.api",
    "load": "gptsmith.api",
    "masks": "gptsmith.model",
    "pretrain": "gptsmith.api",
}

__all__ = [
    "Batch",
    "Chat",
    "Corpus",
    "Engine",
    "FeedForward",
    "GPTModel",
    "Generation",
    "KVCache",
    "LoadedRun",
    "Mask",
    "ModelConfig",
    "MultiHeadAttention",
    "RMSNorm",
    "Request",
    "Run",
    "SamplingConfig",
    "SwiGLU",
    "TokenEmbedding",
    "Tokenizer",
    "TransformerBlock",
    "Windows",
    "__version__",
    "finetune",
    "load",
    "masks",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptsmith' has no attribute {name!r}")
    if name == "masks":
        return import_module("gptsmith.model.masks")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from gptsmith.generate.constraint import Constraint
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

_NAMES = {  # module -> the public names that it has
    "api": "LoadedRun finetune load pretrain",
    "batch": "Batch",
    "data.dataset": "Windows",
    "data.shards": "Corpus",
    "generate.chat": "Chat",
    "generate.constraint": "Constraint",
    "generate.engine": "Engine",
    "generate.options": "SamplingConfig",
    "generate.request": "Generation Request",
    "model": "masks",
    "model.config": "ModelConfig",
    "model.gpt": "FeedForward GPTModel MultiHeadAttention RMSNorm SwiGLU TokenEmbedding "
    "TransformerBlock",
    "model.kv_cache": "KVCache",
    "model.masks": "Mask",
    "run": "Run",
    "tokenizer": "Tokenizer",
}
_HOMES = {name: f"gptsmith.{home}" for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Batch",
    "Chat",
    "Constraint",
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

"""gptsmith: a small GPT through its whole life, from raw text to export.

The names below are loaded when they are first used: `import gptsmith` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptsmith.data.shards import Corpus
    from gptsmith.generate.chat import Chat
    from gptsmith.generate.engine import Engine
    from gptsmith.generate.options import SamplingConfig
    from gptsmith.generate.request import Generation, Request
    from gptsmith.model.config import ModelConfig
    from gptsmith.model.gpt import GPTModel
    from gptsmith.model.kv_cache import KVCache
    from gptsmith.model.masks import Mask
    from gptsmith.run import Run
    from gptsmith.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Corpus",
    "Engine",
    "GPTModel",
    "Generation",
    "KVCache",
    "Mask",
    "ModelConfig",
    "Request",
    "Run",
    "SamplingConfig",
    "Tokenizer",
    "__version__",
]

_HOMES = {
    "Chat": "gptsmith.generate.chat",
    "Corpus": "gptsmith.data.shards",
    "Engine": "gptsmith.generate.engine",
    "GPTModel": "gptsmith.model.gpt",
    "Generation": "gptsmith.generate.request",
    "KVCache": "gptsmith.model.kv_cache",
    "Mask": "gptsmith.model.masks",
    "ModelConfig": "gptsmith.model.config",
    "Request": "gptsmith.generate.request",
    "Run": "gptsmith.run",
    "SamplingConfig": "gptsmith.generate.options",
    "Tokenizer": "gptsmith.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptsmith' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

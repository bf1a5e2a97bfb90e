"""gptsmith: a small GPT through its whole life, from raw text to export.

The names below are loaded when they are first used: `import gptsmith` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptsmith.data.shards import Corpus
    from gptsmith.generate.chat import generate_chat_response, generate_multi_turn_response
    from gptsmith.generate.sampling import SamplingConfig
    from gptsmith.model.config import ModelConfig
    from gptsmith.model.gpt import GPTModel
    from gptsmith.model.kv_cache import KVCache
    from gptsmith.model.masks import Mask
    from gptsmith.run import Run
    from gptsmith.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Corpus",
    "GPTModel",
    "KVCache",
    "Mask",
    "ModelConfig",
    "Run",
    "SamplingConfig",
    "Tokenizer",
    "__version__",
    "generate_chat_response",
    "generate_multi_turn_response",
]

_HOMES = {
    "Corpus": "gptsmith.data.shards",
    "GPTModel": "gptsmith.model.gpt",
    "KVCache": "gptsmith.model.kv_cache",
    "Mask": "gptsmith.model.masks",
    "ModelConfig": "gptsmith.model.config",
    "Run": "gptsmith.run",
    "SamplingConfig": "gptsmith.generate.sampling",
    "Tokenizer": "gptsmith.tokenizer",
    "generate_chat_response": "gptsmith.generate.chat",
    "generate_multi_turn_response": "gptsmith.generate.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptsmith' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

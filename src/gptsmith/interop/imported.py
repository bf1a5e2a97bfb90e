"""A model from elsewhere, understood but not yet read: what every reader of a format gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Imported:
    """A foreign model in our terms. Its weights stay where they are until `tensors` is called."""

    config: ModelConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """By our names, in any order, each read when it is reached; a tied head comes once."""
    dtype: torch.dtype
    """Of every tensor; where the source mixes several, the widest."""
    tokenizer: Tokenizer
    template: str | None
    """Chat template, Jinja."""
    origin: dict[str, str | int]
    """What config.yaml says of it: `import` (the source as the user named it), `format`, ..."""
    notes: list[str]
    """What the user should hear, one line each."""

"""A model from elsewhere, understood but not yet read: what every reader of a format gives."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExternalModel:
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


def config_error(path: Path, error: ValidationError, names: Mapping[str, str]) -> ValueError:
    """What our configuration says of a value, in the words of the file that has it.

    names: our field -> what the file calls it, where that is another name.
    """
    first = error.errors()[0]
    why = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not first["loc"]:  # about several fields, which it names
        return ValueError(f"{path}: {why}")
    field = ".".join(map(str, first["loc"]))
    value = "missing" if first["type"] == "missing" else f"{first['input']!r:.40}"
    return ValueError(f"{path}: {names.get(field, field)} is {value}: {why}")

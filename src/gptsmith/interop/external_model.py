"""Models between a run and a foreign format: what importers return and exporters take."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExternalModel:
    """A model from elsewhere. Its weights are not read until `tensors` is called."""

    config: ModelConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Under our names, one at a time, in any order; without the head if it is tied."""
    dtype: torch.dtype
    """Of all tensors: the widest one in the source."""
    tokenizer: Tokenizer
    template: str | None
    """Chat template, Jinja."""
    origin: dict[str, str | int]
    """For config.yaml: `import` (the source as the user named it), `format`, ..."""
    notes: list[str]
    """For the user, one line each."""


@dataclass(frozen=True)
class ExportableModel:
    """A model of ours, in the form that exporters take."""

    name: str
    config: ModelConfig
    tensors: Callable[[], Mapping[str, Tensor]]
    """The whole state dict, adapters merged."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    imported_from: str = ""
    """For the model card: the Hub's name of what the run was imported from, or a file name."""


def check_vocabulary(
    origin: str | Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    remedy: str = "they do not belong together",
) -> None:
    """ValueError for a tokenizer with more ids than the model has vectors."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{origin}: the tokenizer has {tokenizer.vocab_size:,} ids, but the model has vectors "
            f"for {config.vocab_size:,}: {remedy}"
        )


def config_from(
    sizes: Mapping[str, Any], names: Mapping[str, str], path: Path, **fields: Any
) -> ModelConfig:
    """GPT-2's preset with the `sizes` of a file. names: the file's name of each size -> ours.

    Raises ValueError naming `path` and the size that is missing or invalid.
    """
    values = {ours: sizes.get(theirs) for theirs, ours in names.items()}
    try:
        return ModelConfig.preset("gpt2", **values, **fields)
    except ValidationError as error:
        raise config_error(path, error, {ours: theirs for theirs, ours in names.items()}) from None


def config_error(path: Path, error: ValidationError, names: Mapping[str, str]) -> ValueError:
    """A validation error of ModelConfig in terms of the foreign file.

    names: our field -> the file's name, where they differ.
    """
    first = error.errors()[0]
    why = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not first["loc"]:  # about several fields, which it names
        return ValueError(f"{path}: {why}")
    field = ".".join(map(str, first["loc"]))
    value = "missing" if first["type"] == "missing" else f"{first['input']!r:.40}"
    return ValueError(f"{path}: {names.get(field, field)} is {value}: {why}")

"""A configuration class, and what the command line and a recipe make of it."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptsmith import config as configuration
from gptsmith.model.config import ModelConfig


class Optimizer(BaseModel):
    """How weights move."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, description="Peak rate, 100% after warmup.")
    momentum: float = 0.95


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    data: Path
    """Folder of a prepared corpus."""
    model: ModelConfig = ModelConfig.preset("tiny")
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    tokens: int | None = None
    resume: bool = False
    stop: tuple[str, ...] = ()
    checkpoint: Literal["last", "best"] | int = "last"
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.resume and self.tokens == 0:
            raise ValueError("nothing to resume with tokens 0")
        return self


def load(*argv: str, kind: type[Any] = Recipe, **options: Any) -> Any:
    return configuration.load_config(kind, argv, prog="gptsmith test", **options)


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def rejected(*argv: str, kind: type[Any] = Recipe) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load(*argv, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) in (ValueError, FileNotFoundError, IsADirectoryError)
    return message

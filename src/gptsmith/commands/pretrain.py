"""`gptsmith pretrain [RECIPE.yaml] --data CORPUS --out RUN [--section.field VALUE]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gptsmith.config import load_config
from gptsmith.recipes.options import PretrainConfig, RecipeConfig
from gptsmith.run.resume import stored_recipe
from gptsmith.train import distributed
from gptsmith.train.monitor import command_start

R = TypeVar("R", bound=RecipeConfig)


def main(argv: Sequence[str], started: float | None = None) -> int:
    """started: see recipes.pretrain.pretrain; default the start of this process."""
    with distributed.connected():
        config = recipe_config("pretrain", PretrainConfig, argv)
        from gptsmith.recipes.pretrain import pretrain  # imports torch: not before --help, errors

        return pretrain(config, command_start() if started is None else started)


def recipe_config(verb: str, config_class: type[R], argv: Sequence[str]) -> R:
    """The configuration of a recipe; with --resume, over that of the run."""

    def recipe(flags: Mapping[str, Any], given: list[str]) -> list[str]:
        if not flags.get("resume") or "out" not in flags:
            return given
        return stored_recipe(Path(flags["out"]), given, flags, config_class)

    return load_config(config_class, argv, prog=f"gptsmith {verb}", recipe=recipe)

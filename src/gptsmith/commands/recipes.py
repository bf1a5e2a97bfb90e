"""`gptsmith recipes [NAME]`: the recipes that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptsmith import terminal
from gptsmith.config import Section, load_config
from gptsmith.flags import nearest

FOLDER = Path(__file__).parents[1] / "configs"


class RecipesOptions(Section):
    """List the recipes that come with gptsmith, or print one (`> mine.yaml`) to train with, as it
    is or changed."""

    name: str = ""
    """Which recipe, or script for a cluster, to print (default: list all)."""


def main(argv: Sequence[str]) -> None:
    options = load_config(RecipesOptions, argv, prog="gptsmith recipes", positional="name")
    recipes = {name_of(path): path for path in FOLDER.rglob("*") if path.is_file()}
    if not options.name:
        width = max(map(len, recipes))
        for name in sorted(recipes, key=lambda name: ("/" in name, name)):
            terminal.say(f"{name:<{width}}  {about(recipes[name])}")
        return
    name = options.name.removeprefix("configs/").removesuffix(".yaml")  # as pages spell it
    if name not in recipes:
        parts = {known.rpartition("/")[2]: known for known in recipes}
        near = nearest(name, [*parts, *recipes])
        hint = f"did you mean {parts.get(near, near)}?" if near else "`gptsmith recipes` lists all"
        raise ValueError(f"no recipe {options.name!r}: {hint}")
    terminal.write(recipes[name].read_text(encoding="utf-8"), end="")


def name_of(recipe: Path) -> str:
    """`finetune/alpaca` for configs/finetune/alpaca.yaml; scripts keep their ending."""
    return recipe.relative_to(FOLDER).as_posix().removesuffix(".yaml")


def about(recipe: Path) -> str:
    """The first comment of a recipe or script."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if not line.startswith("#!")).removeprefix("# ")

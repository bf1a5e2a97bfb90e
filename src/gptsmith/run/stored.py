"""A run's own configuration as the recipe of its resumption."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptsmith.config import diff, flatten, rename_keys
from gptsmith.model.config import ModelConfig
from gptsmith.run import layout


def stored_recipe(
    out: Path, words: Sequence[str], flags: Collection[str], known: Collection[str], verb: str
) -> list[str]:
    """RUN/config.yaml, which records what the first start chose, in the place of the recipe.

    words: the recipe that is given, if any. flags: names of what is given beside it (`train.steps`,
    `model`). known: the fields of `verb`. Raises ValueError when there is nothing to resume,
    when the run is of another verb, and with the differences when the recipe says otherwise.
    """
    layout.refuse_unresumable(out)
    path = out / layout.CONFIG
    stored = rename_keys(layout.read_yaml(path))
    if foreign := [name for name in stored if name not in known]:
        raise ValueError(
            f"{out} was not made by gptsmith {verb}, which knows no {foreign[0]!r} (in {path}): "
            "resume it by the command that started it"
        )
    if len(words) > 1 or any(not word.endswith((".yaml", ".yml")) for word in words):
        return list(words)  # which load_config refuses
    for word in words:
        given = rename_keys(layout.read_yaml(Path(word)))
        if changes := recipe_changes(given, stored, set(flags)):
            raise ValueError(
                f"{word} is not what {out} was started with: {'; '.join(changes)};"
                " leave the recipe away, or give a change that is meant as a flag"
            )
    return [str(path)]


def recipe_changes(
    recipe: Mapping[str, Any], stored: Mapping[str, Any], flags: set[str]
) -> list[str]:
    """Where a recipe differs from a stored configuration, in the lines of `diff`.

    Ignored are values that `flags` replace and values that the run filled in when it started.
    """

    def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
        model = tree.get("model")
        if isinstance(model, str) or (isinstance(model, dict) and "preset" in model):
            fields = {"preset": model} if isinstance(model, str) else dict(model)
            preset = fields.pop("preset")
            tree = {**tree, "model": ModelConfig.preset(preset, **fields).model_dump(mode="json")}
        return flatten(tree)

    def number(value: Any) -> Any:
        try:  # 3e-4 and 1e6 are text in YAML
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    now, before = plain(recipe), plain(stored)
    written = {
        name: value
        for name, value in now.items()
        if value not in (None, "auto")
        and name not in ("out", "resume", "model.vocab_size")
        and not any(name == flag or name.startswith(f"{flag}.") for flag in flags)
        and number(value) != number(before.get(name))
    }
    return diff({name: before.get(name) for name in written}, written)

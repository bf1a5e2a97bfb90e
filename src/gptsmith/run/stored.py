"""A run's own configuration as the recipe of its resumption."""

from collections.abc import Collection, Sequence
from pathlib import Path

from gptsmith.differences import recipe_changes
from gptsmith.run import layout


def stored_recipe(
    out: Path, words: Sequence[str], flags: Collection[str], known: Collection[str], verb: str
) -> list[str]:
    """RUN/config.yaml, which records what the first start chose, in the place of the recipe.

    words: the recipe that is given, if any. flags: names of what is given beside it (`train.steps`,
    `model.preset`). known: the fields of `verb`. Raises ValueError when there is nothing to resume,
    when the run is of another verb, and with the differences when the recipe says otherwise.
    """
    layout.refuse_unresumable(out)
    path = out / layout.CONFIG
    stored = layout.read_yaml(path)
    if foreign := [name for name in stored if name not in known]:
        raise ValueError(
            f"{out} was not made by gptsmith {verb}, which knows no {foreign[0]!r} (in {path}): "
            "resume it by the command that started it"
        )
    if len(words) > 1 or any(not word.endswith((".yaml", ".yml")) for word in words):
        return list(words)  # which settings.load refuses
    for word in words:
        given = layout.read_yaml(Path(word))
        if changes := recipe_changes(given, stored, {f.removesuffix(".preset") for f in flags}):
            raise ValueError(
                f"{word} is not what {out} was started with: {'; '.join(changes)};"
                " leave the recipe away, or give a change that is meant as a flag"
            )
    return [str(path)]

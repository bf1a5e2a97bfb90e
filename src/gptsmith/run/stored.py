"""A run's own configuration as the recipe of its resumption."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from gptsmith.differences import recipe_changes
from gptsmith.run import layout


def with_stored_recipe(argv: Sequence[str]) -> list[str]:
    """On --resume, the arguments with RUN/config.yaml in the place of the recipe: it records
    what the first start chose. Flags still come after it.

    Raises ValueError with the differences when the recipe that is given says otherwise, and
    when there is nothing to resume.
    """
    argv = list(argv)
    out = next((b for a, b in pairwise(argv) if a == "--out"), None)
    out = next((a[6:] for a in argv if a.startswith("--out=")), out)
    if "--resume" not in argv or out is None:
        return argv
    layout.refuse_unresumable(Path(out))
    stored = Path(out, layout.CONFIG)
    flags = {a.partition("=")[0][2:].replace("-", "_") for a in argv if a.startswith("--")}
    for i, word in enumerate(argv):
        if word.endswith((".yaml", ".yml")) and not word.startswith("-"):
            given = layout.read_yaml(Path(word))
            if changes := recipe_changes(given, layout.read_yaml(stored), flags):
                raise ValueError(
                    f"{word} is not what {out} was started with: {'; '.join(changes)};"
                    " leave the recipe away, or give a change that is meant as a flag"
                )
            return [*argv[:i], str(stored), *argv[i + 1 :]]
    return [str(stored), *argv]

"""Whether a run may be started or resumed in a folder, and with which configuration."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptsmith.config import diff, flatten
from gptsmith.model.config import ModelConfig
from gptsmith.run import layout
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor


def check_unoccupied(path: Path) -> None:
    """Raise unless a new run can be written to `path`: a new or empty folder, or one whose run was
    stopped before its first checkpoint."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder as --out")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a broken link: choose another --out")
    if not path.exists() or not any(path.iterdir()) or _is_untrained(path):
        return
    if layout.is_run(path):
        raise FileExistsError(f"{path} contains a run: --resume it, or choose another --out")
    raise FileExistsError(f"{path} is not empty and contains no run: choose another --out")


def check_resumable(path: Path) -> None:
    """Raise ValueError unless `path` is a run with a checkpoint."""
    if not layout.is_run(path):
        raise ValueError(f"nothing to resume: {layout.not_a_run_error(path)}")
    if _is_untrained(path):
        raise ValueError(
            f"nothing to resume: {path} was stopped before its first checkpoint;"
            " omit --resume to start it again"
        )
    if not checkpoints.steps(path / layout.CHECKPOINTS):
        raise ValueError(
            f"nothing to resume: {path} has no checkpoints; gptsmith finetune KIND --from {path} "
            "trains its final weights further"
        )


def _is_untrained(path: Path) -> bool:
    """Whether this is a run (it has the lock file) that has not trained yet."""
    final = (path / layout.WEIGHTS, path / layout.ADAPTER / layout.ADAPTER_WEIGHTS)
    trained = any(map(Path.exists, final)) or bool(checkpoints.steps(path / layout.CHECKPOINTS))
    events = monitor.read_events(path / monitor.METRICS)
    return (path / layout.LOCK).exists() and not trained and not any(e["step"] for e in events)


def stored_recipe(
    out: Path, recipes: Sequence[str], flags: Collection[str], stage: str
) -> list[str]:
    """The recipe of a resumed run: its own config.yaml.

    recipes: files named on the command line, at most one. flags: names of the flags that are set
    there (`train.steps`, `model`). stage: of the command. Raises ValueError if there is nothing to
    resume, if the run is of another stage, or with the differences if the recipe has changed.
    """
    check_resumable(out)
    path = out / layout.CONFIG
    stored = layout.read_config(path)
    if (made_by := layout.stage_of(stored)) != stage:
        command = made_by if made_by in ("pretrain", "import") else f"finetune {made_by}"
        raise ValueError(f"{out} was made by gptsmith {command}: resume it with that command")
    if len(recipes) > 1 or any(not recipe.endswith((".yaml", ".yml")) for recipe in recipes):
        return list(recipes)  # which load_config rejects
    for recipe in recipes:
        if changes := recipe_changes(layout.read_config(Path(recipe)), stored, set(flags)):
            raise ValueError(
                f"{recipe} is not what {out} was started with: {'; '.join(changes)};"
                " omit the recipe, or give intended changes as flags"
            )
    return [str(path)]


def recipe_changes(
    recipe: Mapping[str, Any], stored: Mapping[str, Any], flags: set[str]
) -> list[str]:
    """How a recipe differs from a stored configuration, as lines of `diff`.

    Values that `flags` replace, and values that the run resolved when it started, do not count.
    """

    def resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
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

    new, old = resolved(recipe), resolved(stored)
    changed = {
        name: value
        for name, value in new.items()
        if value not in (None, "auto")
        and name not in ("out", "resume", "model.vocab_size")
        and not any(name == flag or name.startswith(f"{flag}.") for flag in flags)
        and number(value) != number(old.get(name))
    }
    return diff({name: old.get(name) for name in changed}, changed)

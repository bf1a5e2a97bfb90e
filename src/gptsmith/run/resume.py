"""Whether a run may be started or resumed in a folder, and with which configuration."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from gptsmith import files
from gptsmith.config import diff, flatten, read_recipe
from gptsmith.flags import options_of
from gptsmith.run import digests, layout
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor


def check_unoccupied(path: Path) -> None:
    """Raise unless a new run can be written to `path`: a new or empty folder, or one whose run was
    stopped before its first checkpoint."""
    files.lowest_existing_folder(path)
    if not path.exists() or not any(path.iterdir()) or _is_untrained(path):
        return
    if not layout.is_run(path):
        raise FileExistsError(f"{path} is not empty and contains no run: choose another --out")
    steps = checkpoints.steps(path / layout.CHECKPOINTS)
    if not steps:
        raise FileExistsError(f"{path} contains a run: choose another --out")
    stage = layout.stage_of(layout.read_config(path / layout.CONFIG))
    command, final = layout.resume_command(path, stage), final_step(path)
    what = f"an unfinished run, at step {steps[-1]:,}: {command} continues it"
    if final is not None and final >= steps[-1]:
        what = f"a run that ended at step {final:,}: {command} --train.steps N trains it further"
    raise FileExistsError(f"{path} contains {what}; or choose another --out")


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


def final_step(path: Path) -> int | None:
    """The step at which the training of a run ended; None if it has no such final weights."""
    for name in (layout.WEIGHTS, f"{layout.ADAPTER}/{layout.ADAPTER_WEIGHTS}"):
        with (
            suppress(OSError, SafetensorError, ValueError, KeyError, TypeError),
            safe_open(path / name, "np") as file,
        ):
            return int(file.metadata()["step"])
    return None


def _is_untrained(path: Path) -> bool:
    """Whether this is a run (it has the lock file) that has not trained yet."""
    final = (path / layout.WEIGHTS, path / layout.ADAPTER / layout.ADAPTER_WEIGHTS)
    if any(map(Path.exists, final)) or checkpoints.steps(path / layout.CHECKPOINTS):
        return False
    events = monitor.read_events(path / monitor.METRICS)
    return (path / layout.LOCK).exists() and not any(e["step"] for e in events)


def stored_recipe(
    out: Path, recipes: Sequence[str], flags: Collection[str], config_class: type[BaseModel]
) -> list[str]:
    """The recipe of a resumed run: its own config.yaml.

    recipes: files named on the command line, at most one. flags: names of the flags that are set
    there (`train.steps`, `model`). config_class: of the command. Raises ValueError if there is
    nothing to resume, if the run is of another stage, or with the differences if the recipe has
    changed.
    """
    check_resumable(out)
    path = out / layout.CONFIG
    digests.check(out, layout.CONFIG)
    made_by = layout.stage_of(layout.read_config(path))
    if made_by != config_class.model_fields["stage"].default:
        raise ValueError(
            f"{out} was made by gptsmith {layout.command_of(made_by)}: resume it with that command"
        )
    if len(recipes) > 1 or any(not recipe.endswith((".yaml", ".yml")) for recipe in recipes):
        return list(recipes)  # which load_config rejects
    for recipe in recipes:
        if changes := recipe_changes(Path(recipe), path, config_class, set(flags)):
            raise ValueError(
                f"{recipe} is not what {out} was started with: {'; '.join(changes)};"
                " omit the recipe, or give intended changes as flags"
            )
    return [str(path)]


def recipe_changes(
    recipe: Path, stored: Path, config_class: type[BaseModel], flags: set[str]
) -> list[str]:
    """How a recipe differs from a stored configuration, as lines of `diff`.

    Values are compared after conversion to the types of their fields. Values that `flags` replace
    or that the run resolved when it started are ignored.
    """
    defaults = {".".join(path): o.default for path, o in options_of(config_class).items()}
    new, old = _values(recipe, config_class), defaults | _values(stored, config_class)
    changed = {
        name: value
        for name, value in new.items()
        if value not in (None, "auto")
        and name not in ("out", "resume", "model.vocab_size")
        and not any(name == flag or name.startswith(f"{flag}.") for flag in flags)
        and value != old.get(name)
    }
    return diff({name: old.get(name) for name in changed}, changed)


def _values(path: Path, config_class: type[BaseModel]) -> dict[str, Any]:
    """The values of a recipe by name, in the types of their fields, with presets expanded."""
    options, settings = options_of(config_class), read_recipe(path, config_class)
    values: dict[str, Any] = {}
    for preset in settings:
        section = options[preset.path].section
        if section is not None and preset.value is not None:
            length = len(preset.path)
            inner = (s for s in settings if s.path[:length] == preset.path != s.path)
            fields = {s.path[length]: s.value for s in inner}
            built: BaseModel = section.preset(preset.value, **fields)  # type: ignore[attr-defined]
            values |= flatten(built.model_dump(), f"{'.'.join(preset.path)}.")
    values |= {".".join(s.path): s.value for s in settings if options[s.path].section is None}
    if code := layout.MASK_CODE.fullmatch(str(values.get("model.mask", "")).strip()):
        values["model.mask"] = f"{layout.MASK}:{code[2]}"  # a run has a copy of the file
    return values


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that change on a resume, as lines of `diff`, for the user."""
    a, b = flatten(old), flatten(new)
    names = [name for name in b if name in a and name not in ("out", "resume")]
    return diff({name: a[name] for name in names}, {name: b[name] for name in names})

"""What differs between two configurations, in lines that people read."""

from collections.abc import Mapping
from typing import Any

from gptsmith.model.config import ModelConfig
from gptsmith.train.trackers import flatten


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines like `model.n_layer: 4 -> 6` for all that differs between two nested mappings."""
    a, b = flatten(old), flatten(new)
    names = [*a, *(name for name in b if name not in a)]
    return [
        f"{name}: {a.get(name, '(absent)')} -> {b.get(name, '(absent)')}"
        for name in names
        if name not in a or name not in b or a[name] != b[name]
    ]


def recipe_changes(
    recipe: Mapping[str, Any], stored: Mapping[str, Any], flags: set[str]
) -> list[str]:
    """Where a recipe differs from config.yaml, but for what flags replace or the start fills in."""

    def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
        model = tree.get("model")
        if isinstance(model, str) or (isinstance(model, dict) and "preset" in model):
            fields = {"preset": model} if isinstance(model, str) else dict(model)
            preset = ModelConfig.preset(fields.pop("preset"))
            tree = {**tree, "model": {**preset.model_dump(), **fields}}
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

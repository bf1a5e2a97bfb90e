"""Build a configuration from three layers: preset or defaults < recipe YAML < command line.

Recipe and flags are read into one list of settings (path, value, place), from which the
configuration class is built once. A flag therefore replaces exactly the field it names, and sizes
that a class derives from others (head_dim from n_embd) are derived from the final values. YAML
scalars are read as text, like flags: the type of the field decides what they mean. Every user error
is a ValueError or OSError of one line that starts with its place: file and line, or the flag.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gptsmith.flags import (
    FlagParser,
    Option,
    OptionPath,
    Setting,
    flag_name,
    nearest,
    options_of,
    reason,
)
from gptsmith.flags import Section as Section

# Keys of earlier versions: stored runs and older recipes contain them.
RENAMED_KEYS = {
    "pad_vocab": "pad_vocab_multiple",
    "model.tied": "model.tie_embeddings",
    "train.tokens_per_step": "train.total_batch_tokens",
    "train.recompute_activations": "train.activation_checkpointing",
    "train.threads": "train.num_threads",
    "optim.embedding_rate": "optim.embedding_lr_scale",
    "optim.final_rate": "optim.min_lr_ratio",
    "optim.clip": "optim.max_grad_norm",
    "eval.every": "eval.interval",
    "save.every": "save.interval",
    "monitor.log_every": "monitor.log_interval",
}

# Behaviour from before a field existed, where it differs from the default. It applies to stored
# configurations of runs, which name every field of their time; recipes get the current default.
LEGACY_DEFAULTS = {"optim.decay_start": "first-step"}

C = TypeVar("C", bound=BaseModel)


def load_config(
    config_class: type[C],
    argv: Sequence[str],
    *,
    prog: str,
    positional: str | None = None,
    recipe: Callable[[Mapping[str, Any], list[str]], list[str]] = lambda flags, given: given,
) -> C:
    """Parse `[RECIPE.yaml | POSITIONAL...] [--section.field VALUE]` into a configuration.

    The only positional argument is a recipe (.yaml or .yml) or, with `positional`, the value or
    values of the field of that name. A section class with a constructor `preset(name, **fields)`
    also accepts `preset: NAME` in YAML, and `--SECTION NAME` on the command line, where it replaces
    the whole section of the recipe. `--help` prints the class's docstring and the options, and
    exits.

    recipe: called with the flags (`{"train.steps": 10}`) and the positional arguments; returns
    those to use.
    Raises ValueError or OSError with a one-line message that starts with the place of the error.
    """
    options = options_of(config_class)
    parser = FlagParser(options, prog, config_class.__doc__ or "", positional)
    flags, given = parser.read(argv, RENAMED_KEYS)
    given = recipe({".".join(flag.path): flag.value for flag in flags}, given)
    settings: list[Setting] = []
    if positional is not None:
        option, place = options[positional,], positional.upper()
        if len(given) > 1 and not option.item:
            raise ValueError(f"unexpected argument {given[1]!r}: one {positional} was expected")
        if given:
            value = option.convert(given if option.item else given[0], place)
            settings = [Setting((positional,), value, place)]
    else:
        for argument in given:
            if not argument.endswith((".yaml", ".yml")):
                raise ValueError(
                    f"unexpected argument {argument!r}: a recipe is a .yaml file, "
                    "everything else is written --name VALUE (see --help)"
                )
        if len(given) > 1:
            raise ValueError(f"two recipes: {given[0]} and {given[1]}; one was expected")
        settings = read_recipe(Path(given[0]), config_class) if given else []
    presets = [flag.path for flag in flags if options[flag.path].section is not None]
    settings = [s for s in settings if not any(s.path[: len(p)] == p for p in presets)]
    return _build(config_class, options, [*settings, *flags], positional=positional)


# --- recipes -------------------------------------------------------------------------------------


MAX_YAML_BYTES = 200_000  # which take 2 s to parse


class BoundedLoader(yaml.SafeLoader):
    """Rejects aliases of nested values, a few lines of which can expand to billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and isinstance(node, yaml.CollectionNode):
            is_inside = node.end_mark is None  # the alias is a part of what it stands for
            parts = node.value if isinstance(node, yaml.SequenceNode) else sum(node.value, ())
            if is_inside or any(isinstance(part, yaml.CollectionNode) for part in parts):
                raise yaml.MarkedYAMLError(None, None, "an alias of a nested value", mark)
        return node


class _Loader(BoundedLoader):
    """Reads every scalar as text: `no` is not a boolean, and 1.50 keeps its zero."""


_Loader.yaml_implicit_resolvers = {}


def read_recipe(path: Path, config_class: type[BaseModel]) -> list[Setting]:
    """The settings of a YAML recipe, or of the config.yaml of a run; none for an empty file."""
    try:
        if path.is_file() and path.stat().st_size > MAX_YAML_BYTES:
            raise ValueError(f"more than {MAX_YAML_BYTES:,} bytes: not a recipe")
        root = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such recipe (`gptsmith recipes` lists the built-in ones)"
        ) from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: is a folder, not a recipe") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "broken YAML"
        if r"'\t'" in problem:
            problem = "a tab where YAML requires spaces"
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: {problem}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a recipe") from None
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML does not allow
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    options = options_of(config_class)
    settings = [] if root is None else list(_read_section(root, (), options, path))
    given = {setting.path for setting in settings}
    if _is_run_config(path[0] for path in given):
        former = {tuple(name.split(".")): value for name, value in LEGACY_DEFAULTS.items()}
        absent = former.keys() & options.keys() - given
        settings += [Setting(name, former[name], f"{path}: {'.'.join(name)}") for name in absent]
    return settings


def _read_section(
    node: yaml.Node, section: OptionPath, options: Mapping[OptionPath, Option], file: Path
) -> Iterator[Setting]:
    place = f"{file}:{node.start_mark.line + 1}: {'.'.join(section)}"
    has_presets = bool(section) and hasattr(options[section].section, "preset")
    if has_presets and isinstance(node, yaml.ScalarNode):
        yield Setting(section, node.value, place)
        return
    if not isinstance(node, yaml.MappingNode):
        what = "" if section else "a recipe"
        raise ValueError(f"{place}{what} should contain `name: value` lines")
    lines: dict[OptionPath, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        path = (*section, key)
        place = f"{file}:{line}: {'.'.join(path)}"
        if path not in options and ".".join(path) in RENAMED_KEYS:
            path = tuple(RENAMED_KEYS[".".join(path)].split("."))
        if path in lines:
            name = "" if path[-1] == key else f" as {path[-1]}"
            raise ValueError(f"{place} is written twice (first{name} in line {lines[path]})")
        lines[path] = line
        if key == "<<":
            raise ValueError(f"{file}:{line}: `<<` is not supported: write the values out")
        if has_presets and key == "preset":
            if not isinstance(value_node, yaml.ScalarNode):
                raise ValueError(f"{place}: a preset is one name")
            yield Setting(section, value_node.value, place)
        elif path not in options:
            inside = [p for p in options if p[: len(section)] == section != p]
            below = [".".join(p[len(section) :]) for p in inside]
            here = ", ".join(name for name in below if "." not in name)
            near = nearest(key, below)
            hint = f"did you mean {near!r}?" if near else f"valid here are {here}"
            raise ValueError(f"{file}:{line}: unknown key {key!r}: {hint}")
        elif options[path].section is None:
            yield Setting(path, options[path].convert(_value(value_node, place), place), place)
        elif not _is_null(value_node):
            yield from _read_section(value_node, path, options, file)
        elif options[path].takes_none:
            yield Setting(path, None, place)


def _is_null(node: yaml.Node) -> bool:
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return plain and node.value.lower() in ("", "~", "null")


def _value(node: yaml.Node, place: str) -> Any:
    if _is_null(node):
        return None
    try:
        return yaml.constructor.SafeConstructor().construct_object(node, deep=True)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from None
    except Exception:  # whatever yaml raises for a scalar that is not of its tag: !!float ""
        kind = node.tag.rpartition(":")[2]
        raise ValueError(f"{place}: {node.value!r:.40} is no {kind}") from None


def _is_run_config(names: Iterable[str]) -> bool:
    """Whether a configuration with these top-level fields was written by a run, not by a person."""
    return {"out", "resume"} <= set(names)


def rename_keys(mapping: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """A stored configuration as the current version would have written it: with current key names
    (which take precedence over old ones) and with `LEGACY_DEFAULTS`.

    section: which part of a configuration `mapping` is, for example "model" for a model.json.
    """
    renamed: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{section}.{key}" if section else str(key)
        new = RENAMED_KEYS[path].rpartition(".")[2] if path in RENAMED_KEYS else key
        if new == key or new not in mapping:
            renamed[new] = rename_keys(value, path) if isinstance(value, Mapping) else value
    if not section and _is_run_config(mapping):
        for name, value in LEGACY_DEFAULTS.items():
            within, _, field = name.partition(".")
            if isinstance(renamed.get(within), dict):
                renamed[within].setdefault(field, value)
    return renamed


# --- building ------------------------------------------------------------------------------------


def _build(
    kind: type[C],
    options: Mapping[OptionPath, Option],
    settings: Sequence[Setting],
    path: OptionPath = (),
    positional: str | None = None,
) -> C:
    """The section at `path`: its settings applied to the preset they name, or to its default."""
    given: dict[str, Any] = {}
    for child in dict.fromkeys(s.path[: len(path) + 1] for s in settings if s.path != path):
        inner = [s for s in settings if s.path[: len(child)] == child]
        last, section = inner[-1], options[child].section  # of several settings, the last counts
        if section is None or (last.path == child and last.value is None):
            given[child[-1]] = last.value
        else:
            given[child[-1]] = _build(section, options, inner, child)
    preset = next((s for s in reversed(settings) if s.path == path), None)
    places = {s.path: s.place for s in settings if s.path != path}
    base = options[path].default if path else None
    try:
        if preset is not None and preset.value is not None:
            return kind.preset(preset.value, **given)  # type: ignore[attr-defined]
        if isinstance(base, kind) and hasattr(base, "change"):
            return base.change(**given)  # derives the sizes that depend on changed ones again
        if isinstance(base, kind):
            names = {name: field.alias or name for name, field in kind.model_fields.items()}
            given = {names[n]: getattr(base, n) for n in base.model_fields_set} | given
        return kind(**given)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            at = (*path, *(str(part) for part in problem["loc"]))
            if problem["type"] == "missing":
                name = at[0].upper() if at == (positional,) else flag_name(at)
                needed_by = f" with {settings[0].place}" if path else ""
                problems.append(f"{name} is required{needed_by}")
            else:
                place = places.get(at, ".".join(at))
                problems.append(f"{place}: {reason(problem['msg'])}".removeprefix(": "))
        raise ValueError("; ".join(problems)) from None
    except ValueError as error:
        raise ValueError(f"{preset.place if preset else '.'.join(path)}: {error}") from None


# --- comparing -----------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"model": {"n_layer": 4}} becomes {"model.n_layer": 4}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines like `model.n_layer: 4 -> 6` for all differences between two nested mappings."""
    a, b = flatten(old), flatten(new)
    return [
        f"{name}: {a.get(name, '(absent)')} -> {b.get(name, '(absent)')}"
        for name in {**a, **b}
        if name not in a or name not in b or a[name] != b[name]
    ]

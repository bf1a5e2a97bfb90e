"""One configuration from three layers: preset or defaults < recipe YAML < command line.

Recipe and flags are read into the same form, a list of settings (path, raw value, place), laid over
each other, and only then made into the configuration class. So a flag replaces exactly what it
names: sizes that a class derives (head_dim from n_embd) are derived after the last layer spoke.
Every mistake is a ValueError of one line that begins with its place: file and line, or the flag.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from gptsmith.flags import (
    Setting,
    choices,
    fields,
    flag_name,
    list_item,
    nearest,
    read_flags,
    section,
    takes_none,
)

Config = TypeVar("Config", bound=BaseModel)


def load(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: str | None = None,
    recipe: Callable[[Mapping[str, Any], list[str]], list[str]] = lambda flags, words: words,
) -> Config:
    """The configuration that `argv` asks for: `[RECIPE.yaml] [WORDS] [--section.field VALUE]`.

    Without `positional`, a word that ends in .yaml or .yml is the recipe; with it, every word goes
    to the field of that name. A class with a `preset(name, **fields)` constructor takes its name
    from `preset:` in the YAML or from `--SECTION NAME`; on the command line that replaces the
    recipe's whole section. `--help` prints and exits. recipe: what stands for the words, given the
    flags (`train.steps`: its value) and the words.

    Raises ValueError or OSError, in one line that names the place.
    """
    flags, words = read_flags(
        config_class, argv, prog=prog, description=description, positional=positional
    )
    words = recipe({".".join(flag.path): flag.value for flag in flags}, words)
    settings: list[Setting] = []
    if positional is not None:
        many = list_item(fields(config_class)[positional].annotation) is not None
        if len(words) > 1 and not many:
            raise ValueError(f"unexpected argument {words[1]!r}: one {positional} was expected")
        if words:
            value = words if many else words[0]
            settings.append(Setting((positional,), value, positional.upper()))
    else:
        for word in words:
            if not word.endswith((".yaml", ".yml")):
                raise ValueError(
                    f"unexpected argument {word!r}: a recipe is a .yaml file, "
                    "everything else is written --name VALUE (see --help)"
                )
        if len(words) > 1:
            raise ValueError(f"two recipes: {words[0]} and {words[1]}; one was expected")
        settings = [s for word in words for s in read_recipe(Path(word), config_class)]
    for flag in flags:
        if flag.path[-1] == "preset":
            settings = [s for s in settings if s.path[: len(flag.path) - 1] != flag.path[:-1]]
    return _build(config_class, settings + flags, positional)


# --- recipe --------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """No setting is a date, and 2001-13-45 would be an error without a line number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_recipe(path: Path, config_class: type[BaseModel]) -> Iterator[Setting]:
    """The settings of a YAML recipe. An empty file is a recipe that keeps every default."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: is a folder, not a recipe") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "broken YAML"
        if r"'\t'" in problem:
            problem = "a tab where YAML wants spaces"
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: {problem}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a recipe") from None
    except yaml.YAMLError as error:  # characters that no YAML may hold
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if root is not None:
        yield from _read_section(loader, root, config_class, (), path)


def _read_section(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    config_class: type[BaseModel],
    above: tuple[str, ...],
    file: Path,
) -> Iterator[Setting]:
    line = node.start_mark.line + 1
    if _is_null(node):
        return
    if above and isinstance(node, yaml.ScalarNode) and hasattr(config_class, "preset"):
        yield Setting((*above, "preset"), node.value, f"{file}:{line}: {'.'.join(above)}")
        return
    if not isinstance(node, yaml.MappingNode):
        where = ".".join(above) or "a recipe"
        raise ValueError(f"{file}:{line}: {where} should hold `name: value` lines")
    known, seen = fields(config_class), dict[str, int]()
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        line = key_node.start_mark.line + 1
        path = (*above, key)
        place = f"{file}:{line}: {'.'.join(path)}"
        if key in seen:
            raise ValueError(f"{place} is written twice (first in line {seen[key]})")
        seen[key] = line
        if key == "preset" and above and hasattr(config_class, "preset"):
            if not isinstance(value_node, yaml.ScalarNode):
                raise ValueError(f"{place}: a preset is one name")
            yield Setting(path, value_node.value, place)
            continue
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise ValueError(f"{file}:{line}: `<<` does not merge here: write the values out")
        if key not in known:
            raise ValueError(f"{file}:{line}: unknown key {key!r}{_suggest(key, config_class)}")
        annotation = known[key].annotation
        below = section(annotation)
        if below is None:
            yield Setting(path, _value(loader, value_node, annotation, place), place)
        elif _is_null(value_node) and takes_none(annotation):
            yield Setting(path, None, place)
        else:
            yield from _read_section(loader, value_node, below, path, file)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _value(loader: yaml.SafeLoader, node: yaml.Node, annotation: Any, place: str) -> Any:
    item = list_item(annotation)
    if item is not None and isinstance(node, yaml.SequenceNode):
        return [_value(loader, one, item, place) for one in node.value]
    try:
        value = loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from None
    if isinstance(node, yaml.ScalarNode) and value is not None:
        # YAML reads a bare `no`, `on` or `2024` as something else than the text that was written
        kinds = choices(annotation)
        text = all(kind in (str, Path) or isinstance(kind, str) for kind in kinds)
        if text or (isinstance(value, bool) and bool not in kinds):
            return node.value
    return value


def _suggest(key: str, config_class: type[BaseModel]) -> str:
    known = fields(config_class)
    below = {name: section(field.annotation) for name, field in known.items()}
    deep = [f"{name}.{field}" for name, kind in below.items() if kind for field in fields(kind)]
    near = nearest(key, [*known, *deep])
    return f": did you mean {near!r}?" if near else f": valid here are {', '.join(known)}"


# --- building ------------------------------------------------------------------------------------


def _build(config_class: type[Config], settings: list[Setting], positional: str | None) -> Config:
    values: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    for path, value, place in settings:
        into, kind = values, fields(config_class)
        for key in path[:-1]:
            below = section(kind[key].annotation)
            assert below is not None
            kind = fields(below)
            if not isinstance(into.get(key), dict):
                into[key] = {}
            into = into[key]
        places[path] = place
        field = kind.get(path[-1])  # `preset` is no field
        into[path[-1]] = value if field is None else _convert(field, value, place)
    return _make(config_class, values, None, (), places, positional)


def _convert(field: FieldInfo, value: Any, place: str) -> Any:
    """The value in the type of its field, constraints checked."""
    if section(field.annotation) is not None:
        return value
    if isinstance(value, str):
        kinds = choices(field.annotation)
        if value.lower() in ("none", "null") and takes_none(field.annotation):
            return None
        if int in kinds and float not in kinds and re.fullmatch(r"\d[\d.]*[eE]\+?\d+", value):
            number = float(value)  # 1e6 tokens
            value = int(number) if number.is_integer() else value
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{place}: should be UTF-8, got {text!r}")
    kind: Any = field.annotation
    if field.metadata:
        kind = Annotated[(kind, *field.metadata)]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(_wanted(e["msg"]) for e in error.errors()))
        raise ValueError(f"{place}: {wanted}, got {value!r}") from None


def _make(
    config_class: type[Config],
    values: dict[str, Any],
    base: Config | None,
    path: tuple[str, ...],
    places: dict[tuple[str, ...], str],
    positional: str | None,
) -> Config:
    """The section at `path`: `values` over the preset they name, else over `base`."""
    known, given = fields(config_class), dict[str, Any]()
    for name, value in values.items():
        field = known.get(name)  # `preset` is none
        below = None if field is None else section(field.annotation)
        if field is not None and below is not None and isinstance(value, dict):
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            start = default if isinstance(default, below) else None
            value = _make(below, value, start, (*path, name), places, None)
        given[name] = value
    preset = given.pop("preset", None) if hasattr(config_class, "preset") else None
    try:
        if preset is not None:
            return config_class.preset(preset, **given)  # type: ignore[attr-defined]
        if base is not None and hasattr(base, "change"):
            return base.change(**given)  # refills the sizes that follow from changed ones
        kept = {
            field.alias or name: getattr(base, name)
            for name, field in config_class.model_fields.items()
            if base is not None and name in base.model_fields_set
        }
        return config_class(**{**kept, **given})
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            at = (*path, *(str(part) for part in problem["loc"]))
            if problem["type"] == "missing":
                name = at[0].upper() if at == (positional,) else flag_name(at)
                beside = [place for at, place in places.items() if path and at[: len(path)] == path]
                problems.append(" beside ".join([f"{name} is required", *beside[:1]]))
            else:
                where = places.get(at, ".".join(at))
                problems.append(f"{where}: {_wanted(problem['msg'])}".removeprefix(": "))
        raise ValueError("; ".join(problems)) from None
    except ValueError as error:
        raise ValueError(f"{places.get((*path, 'preset'), '.'.join(path))}: {error}") from None


def _wanted(message: str) -> str:
    return re.sub(r"^(Value error, |Assertion failed, |Input (?=should))", "", message)

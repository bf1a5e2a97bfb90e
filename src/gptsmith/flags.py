"""The options of a configuration class: the values of its fields, and their command-line flags."""

import argparse
import difflib
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, HttpUrl, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from gptsmith import terminal

OptionPath = tuple[str, ...]  # ("train", "steps")


class Section(BaseModel):
    """Base class of configurations and their sections. Field docstrings become help texts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Setting:
    """A value given by the user, converted to the type of its option, and where it was given.

    The value of a section is the name of a preset, or None.
    """

    path: OptionPath
    value: Any
    place: str


@dataclass(frozen=True)
class Option:
    """A field of a configuration class or of a section below it."""

    field: FieldInfo
    default: Any
    section: type[BaseModel] | None  # the class of its value, if the field is a section

    @property
    def kinds(self) -> list[Any]:
        return _kinds(self.field.annotation)

    @property
    def takes_none(self) -> bool:
        return types.NoneType in get_args(self.field.annotation)

    @property
    def item(self) -> Any:
        """X of `tuple[X, ...]`; None for one value."""
        return next((get_args(kind)[0] for kind in self.kinds if get_origin(kind) is tuple), None)

    @property
    def help(self) -> str:
        return " ".join((self.field.description or "").split())

    def convert(self, value: Any, place: str) -> Any:
        """Convert the user's input (text, a list of texts, None) to a valid value of the field."""
        if self.section is not None:
            return value
        if isinstance(value, str) and value.lower() in ("none", "null") and self.takes_none:
            return None
        if isinstance(value, str) and int in self.kinds and float not in self.kinds:
            exponent = re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value)
            if exponent and float(value).is_integer():  # --tokens 1e6
                value = int(float(value))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search("[\ud800-\udfff]", text):  # undecodable bytes
                raise ValueError(f"{place}: should be UTF-8, got {text!r}")
        kind: Any = self.field.annotation
        if self.field.metadata:
            kind = Annotated[(kind, *self.field.metadata)]
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            reasons = " or ".join(dict.fromkeys(reason(e["msg"]) for e in error.errors()))
            raise ValueError(f"{place}: {reasons}, got {value!r}") from None


def _kinds(annotation: Any) -> list[Any]:
    """The types and literal values that an annotation allows, except None."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return [kind for argument in arguments for kind in _kinds(argument)]
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin is Literal:
        return list(arguments)
    return [] if annotation in (None, types.NoneType) else [annotation]


def reason(message: str) -> str:
    """A message of pydantic's without its prefix."""
    return re.sub(r"^(Value error, |Assertion failed, |Input (?=should))", "", message)


def options_of(
    config_class: type[BaseModel], above: OptionPath = (), base: BaseModel | None = None
) -> dict[OptionPath, Option]:
    """The options of a class and of the sections below it; `base` holds the defaults, if given.

    Names are aliases where there are any: `source: Path = Field(alias="from")` is `from`.
    """
    options: dict[OptionPath, Option] = {}
    for name, field in config_class.model_fields.items():
        path = (*above, field.alias or name)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        default = default if base is None else getattr(base, name)
        classes = [kind for kind in _kinds(field.annotation) if isinstance(kind, type)]
        section = next((kind for kind in classes if issubclass(kind, BaseModel)), None)
        options[path] = Option(field, default, section)
        if section is not None:
            options |= options_of(section, path, default if isinstance(default, section) else None)
    return options


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, if any; a match of its last dotted part also counts."""
    names = list(names)
    by_word = {name.rpartition(".")[2]: name for name in reversed(names)} | {n: n for n in names}
    near = [word] if word in by_word else []
    if not near and len(word) > 2:
        near = [name for name in by_word if name.startswith(word)]
    # a cutoff below 0.7 suggests unrelated names
    near = near or difflib.get_close_matches(word, by_word, 1, 0.7)
    return by_word[near[0]] if near else None


def flag_name(path: Iterable[str]) -> str:
    return "--" + ".".join(path).replace("_", "-")


_PATH_OPTIONS = {("data",), ("val",), ("test",)}  # of other options, the last value counts


class FlagParser(argparse.ArgumentParser):
    """The flags of `options`, and their help. Other arguments are left to the caller."""

    def __init__(
        self,
        options: Mapping[OptionPath, Option],
        prog: str,
        description: str,
        positional: str | None,
    ) -> None:
        usage = "[RECIPE.yaml]"
        if positional is not None:
            option = options[positional,]
            usage = positional.upper() + ("..." if option.item else "")
            usage = usage if option.field.is_required() else f"[{usage}]"
            description += f" {usage}: {option.help}" if option.help else ""
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage} [options]",
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # an omitted flag is no setting
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        )
        self.options, self.names, self.switches = options, ["help"], set[str]()
        groups: dict[OptionPath, Any] = {(): self}
        for path, option in options.items():
            if option.section is not None:
                about = option.help or (option.section.__doc__ or "").strip().partition("\n")[0]
                groups[path] = self.add_argument_group(".".join(path), about)
            if path != (positional,) and (arguments := _arguments(option)):
                group = groups.get(path) or groups[path[:-1]]
                if path in _PATH_OPTIONS:
                    arguments["action"] = "append"
                action = group.add_argument(flag_name(path), dest=".".join(path), **arguments)
                self.names += [name[2:] for name in action.option_strings]
                if isinstance(action, argparse.BooleanOptionalAction):
                    self.switches.add(flag_name(path))

    def read(
        self, argv: Sequence[str], renamed: Mapping[str, str]
    ) -> tuple[list[Setting], list[str]]:
        """The settings from the flags, and the other arguments; `--` ends the flags.

        renamed: old names of options -> current ones, to suggest the latter.
        """
        stop = list(argv).index("--") if "--" in argv else len(argv)
        values, others = self.parse_known_args(self._normalize(argv[:stop]))
        for argument in others:
            if argument.startswith("-") and argument != "-":
                flag = argument.partition("=")[0]
                now = {flag_name([old]): flag_name([new]) for old, new in renamed.items()}
                near = nearest(flag.lstrip("-"), self.names)
                if now.get(flag, "")[2:] in self.names:
                    near = now[flag][2:]
                hint = f": did you mean --{near}?" if near else " (see --help)"
                raise ValueError(f"unknown option {flag}{hint}")
        settings = []
        for dest, value in vars(values).items():
            path = tuple(dest.split("."))
            option, place = self.options[path], flag_name(path)
            if path in _PATH_OPTIONS and option.item is None:
                if len(set(value)) > 1:  # the last one would silently replace the others
                    raise ValueError(
                        f"{place} is given twice ({value[0]} and {value[1]}), and takes one path: "
                        "give one, or put the files into one folder or corpus"
                    )
                value = value[0]
            settings.append(Setting(path, option.convert(value, place), place))
        return settings, [*others, *argv[stop + 1 :]]

    def _normalize(self, argv: Sequence[str]) -> list[str]:
        """Hyphens for underscores in flag names; `--flag false`, `--flag=false` as `--no-flag`."""
        out: list[str] = []
        for word in argv:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            elif out and out[-1] in self.switches and word.lower() in ("true", "false"):
                name, equals, value = out.pop(), "=", word
            if name in self.switches and value.lower() in ("true", "false"):
                out.append(name if value.lower() == "true" else f"--no-{name[2:]}")
            else:
                out.append(name + equals + value)
        return out

    def print_help(self, file: object = None) -> None:
        terminal.say(self.format_help().rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (a value that starts with a dash is written --name=VALUE)"
        raise ValueError(message.removeprefix("argument "))


def _arguments(option: Option) -> dict[str, Any]:
    """The keyword arguments of `add_argument`; none for a section without presets or a constant."""
    if option.section is not None:
        names = ", ".join(getattr(sys.modules[option.section.__module__], "PRESETS", ()))
        preset = {"metavar": "PRESET", "help": f"start from a preset: {names}"}
        return preset if hasattr(option.section, "preset") else {}
    if get_origin(option.field.annotation) is Literal and len(option.kinds) == 1:
        return {}  # a constant, such as the `stage` in a config.yaml, is not an option
    about = option.help
    if option.field.is_required():
        about += " (required)"
    elif "default:" not in about.lower():  # otherwise the text says what the default means
        about += f" (default: {format_default(option.default)})"
    arguments: dict[str, Any] = {"help": about.strip().replace("%", "%%")}
    if set(option.kinds) == {bool}:
        return arguments | {"action": argparse.BooleanOptionalAction}
    if option.item is not None:
        return arguments | {"action": "append", "metavar": metavar(option.item)}
    return arguments | {"metavar": metavar(option.field.annotation)}


def metavar(annotation: Any) -> str:
    names = {
        int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", HttpUrl: "URL", bool: "true|false",
    }  # fmt: skip
    return "|".join(names.get(kind, str(kind)) for kind in _kinds(annotation))


def format_default(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "none", True: "yes", False: "no"}[default]
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return str(default) or "empty"

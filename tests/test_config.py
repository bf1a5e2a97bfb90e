"""Layers of configuration, and one-line messages that name the place of an error."""

import re
from functools import partial
from pathlib import Path

import pytest
from example_config import Optimizer, load, rejected, write
from pydantic import BaseModel, ConfigDict, Field

from gptsmith import config as configuration
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.recipes.options import PretrainConfig


def test_layers(tmp_path: Path) -> None:
    recipe = write(tmp_path, "data: a\noptimizer:\n  learning_rate: 1e-2\n  name: muon\n")
    config = load(recipe, "--optimizer.name", "adamw", "--data=b")
    assert config.data == Path("b")
    assert config.optimizer == Optimizer(name="adamw", learning_rate=1e-2)
    assert load("--data", "a", recipe) == load(recipe, "--data", "a")


def test_defaults_of_the_recipe_class_stay_under_a_partial_section() -> None:
    config = load("--data", "a", "--optimizer.name", "muon", "--model.n-layer", "3")
    assert config.optimizer.learning_rate == 1e-3  # Recipe's default, not Optimizer's
    assert config.model == ModelConfig.preset("tiny", n_layer=3)


def test_derived_sizes_follow_the_last_layer(tmp_path: Path) -> None:
    recipe = write(tmp_path, "data: a\nmodel:\n  n_embd: 64\n")
    assert load(recipe).model.head_dim == 16
    assert load(recipe, "--model.n_embd", "32").model.head_dim == 8


@pytest.mark.parametrize("section", ["model: nano", "model:\n  preset: nano"])
def test_fields_override_the_preset(tmp_path: Path, section: str) -> None:
    assert load(write(tmp_path, f"data: a\n{section}\n")).model == ModelConfig.preset("nano")


def test_preset_with_fields(tmp_path: Path) -> None:
    recipe = write(tmp_path, "data: a\nmodel:\n  n_layer: 3\n  preset: nano\n")
    assert load(recipe).model == ModelConfig.preset("nano", n_layer=3)
    config = load(recipe, "--model.dropout", "0.1")
    assert config.model == ModelConfig.preset("nano", n_layer=3, dropout=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_on_the_command_line_replaces_the_section(tmp_path: Path, name: str) -> None:
    recipe = write(tmp_path, "data: a\nmodel:\n  n_layer: 3\n  dropout: 0.5\n")
    config = load(recipe, "--model.dropout", "0.1", "--model", name)
    assert config.model == ModelConfig.preset(name, dropout=0.1)


def test_empty_recipe_and_empty_sections_keep_defaults(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "model:\noptimizer:\n"):
        assert load(write(tmp_path, text), "--data", "a") == load("--data", "a")


def test_accepted_spellings_of_values(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "data: 2024\noptimizer: {learning_rate: 1e-3, momentum: 8e-1}\nnote: no\n"
    )
    config = load(recipe, "--tokens", "1e6", "--stop", "a b", "--stop", "-", "--resume")
    assert (config.data, config.note, config.tokens) == (Path("2024"), "no", 1_000_000)
    assert config.optimizer == Optimizer(learning_rate=1e-3, momentum=0.8)
    assert config.stop == ("a b", "-")
    assert config.resume
    assert load(write(tmp_path, "data: 2001-13-45")).data == Path("2001-13-45")
    assert load(write(tmp_path, "data: a\nstop: [no, 1.50]")).stop == ("no", "1.50")
    assert not load(recipe, "--resume", "--no-resume").resume
    assert load(recipe, "--model.tie_embeddings", "false", "--resume", "true").resume
    assert not load(recipe, "--model.tie_embeddings", "False").model.tie_embeddings
    assert not load(recipe, "--model.tie_embeddings=false").model.tie_embeddings
    assert load(recipe, "--tokens", "10_000", "--tokens", "none").tokens is None
    assert load(recipe, "--checkpoint", "500").checkpoint == 500
    assert load(recipe, "--note=--x_y").note == "--x_y"
    assert load(recipe, "--note", "a_b=c").note == "a_b=c"


def test_words_are_values_of_the_positional_field() -> None:
    class Words(BaseModel):
        sources: tuple[str, ...]
        out: Path = Path("data")

    words = partial(load, kind=Words, positional="sources")
    assert words("a.yaml", "--out", "x", "b").sources == ("a.yaml", "b")
    assert words("a", "--", "--odd").sources == ("a", "--odd")
    with pytest.raises(ValueError, match=r"^SOURCES is required$"):
        words("--out", "x")


class Lora(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    rank: int = 0
    on: tuple[str, ...] = Field((), alias="in")


class Tuning(BaseModel):
    """Python keeps `from` and `in` for itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    base: Path = Field(alias="from")
    """The run to begin with."""
    lora: Lora = Lora(on=("qkv",))


tuning = partial(load, kind=Tuning)


def test_aliased_field_is_set_by_its_alias(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, "from: runs/a\nlora: {in: [proj]}\n")
    assert tuning(recipe).base == Path("runs/a")
    assert tuning(recipe).lora.on == ("proj",)
    config = tuning(recipe, "--from=runs/b", "--lora.in", "up", "--lora.rank", "8")
    assert (config.base, config.lora.on) == (Path("runs/b"), ("up",))
    assert tuning("--from", "x", "--lora.rank", "8").lora.on == ("qkv",)  # Tuning's default
    dumped = config.model_dump(mode="json", by_alias=True)
    assert dumped == {"from": "runs/b", "lora": {"rank": 8, "in": ["up"]}}
    assert tuning(write(tmp_path, str(dumped))) == config
    with pytest.raises(SystemExit):
        tuning("--help")
    assert "--from PATH The run to begin with. (required)" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        ("", "lora: {}", r"^--from is required$"),
        ("", "base: a", r"unknown key 'base': valid here are from, lora$"),
        ("", "form: a", r"unknown key 'form': did you mean 'from'\?$"),
        ("", "in: a", r"unknown key 'in': did you mean 'lora.in'\?$"),
        ("", "from: [1]", r"recipe.yaml:1: from: .*path"),
        ("--base a", "", r"^unknown option --base "),
        ("--frm a", "", r"^unknown option --frm: did you mean --from\?$"),
    ],
)
def test_errors_name_the_alias(tmp_path: Path, argv: str, text: str, message: str) -> None:
    assert re.search(message, rejected(write(tmp_path, text), *argv.split(), kind=Tuning))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--modle tiny", "unknown option --modle: did you mean --model?"),
        ("--learning-rate 1", "unknown option --learning-rate: did you mean --optimizer.learning"),
        ("--optimizer.lerning_rate=1", "did you mean --optimizer.learning-rate?"),
        ("--qqqqqq", "unknown option --qqqqqq (see --help)"),
        ("--frobnicate", "unknown option --frobnicate (see --help)"),
        ("--lerning_rate 1", "did you mean --optimizer.learning-rate?"),
        ("--check last", "did you mean --checkpoint?"),
        ("-v", "unknown option -v"),
        ("--dat a", "unknown option --dat: did you mean --data?"),
        ("--data", "--data: expected one argument"),
        ("--optimizer.learning-rate x", "--optimizer.learning-rate: should be a valid number"),
        ("--optimizer.learning-rate -1", "--optimizer.learning-rate: should be greater than 0"),
        ("--optimizer.name sgd", "--optimizer.name: should be 'adamw' or 'muon', got 'sgd'"),
        ("--tokens 1e-3", "--tokens: should be a valid integer"),
        ("--data a\udcff", r"--data: should be UTF-8, got 'a\udcff'"),  # bytes of another encoding
        ("--stop a --stop b\udcff", r"--stop: should be UTF-8, got 'b\udcff'"),
        ("--checkpoint first", "--checkpoint: should be 'last' or 'best' or should be a valid int"),
        ("--data a --model tiny --model.labels b", "model: labels has one class, 'b'"),
        ("--model giant", "--model: no model preset 'giant': choose one of gpt2"),
        ("--data a --model.n-kv-head 3", "model: n_head 4 is not a multiple of n_kv_head 3"),
        ("", "--data is required"),
        ("shakespeare", "unexpected argument 'shakespeare': a recipe is a .yaml file"),
        ("a.yaml b.yaml", "two recipes: a.yaml and b.yaml; one was expected"),
        ("nowhere.yaml", "nowhere.yaml: no such recipe (`gptsmith recipes` lists"),
    ],
)
def test_bad_command_line_is_a_one_line_error(argv: str, message: str) -> None:
    assert message in rejected(*argv.split())


def test_help_shows_every_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "gptsmith test [RECIPE.yaml] [options]",
        "--data PATH Folder of a prepared corpus. (required)",
        "--optimizer.learning-rate NUMBER Peak rate, 100% after warmup. (default: 0.001)",
        "--optimizer.name adamw|muon",
        "--model PRESET start from a preset: gpt2, gpt2-medium,",
        "--resume, --no-resume",
    ):
        assert part in text


def test_help_is_the_docstring_of_the_field_where_it_is_defined(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Base(configuration.Section):
        size: int = 1
        """Of which 50% are
        used."""

    class Derived(Base):
        """About 5%."""

        more: Base | None = None
        """Further sizes: 10%."""

    with pytest.raises(SystemExit):
        load("--help", kind=Derived)
    text = " ".join(capsys.readouterr().out.split())
    assert "About 5%. options:" in text
    assert "--size INT Of which 50% are used. (default: 1) more: Further sizes: 10%." in text


def test_a_negated_flag_takes_no_value() -> None:
    assert "unexpected argument 'true'" in rejected("--data", "a", "--no-resume", "true")
    assert "--no-resume" in rejected("--data", "a", "--no-resume=true")


def test_path_given_twice_is_rejected() -> None:
    argv = ["--data", "data/x", "--out", "runs/y", "--data"]
    message = rejected(*argv, "data/z", kind=PretrainConfig)
    assert "--data is given twice (data/x and data/z)" in message
    steps = ["--train.steps", "5", "--train.steps", "6"]
    found = load(*argv, "data/x", *steps, kind=PretrainConfig)
    assert (str(found.data), found.train.steps) == ("data/x", 6)


def test_diff() -> None:
    old = {"model": {"n_layer": 4, "mask": "causal()"}, "seed": 1, "gone": None}
    new = {"model": {"n_layer": 6, "mask": "causal()"}, "seed": 1, "train": {"steps": 5}}
    assert configuration.diff(old, new) == [
        "model.n_layer: 4 -> 6", "gone: None -> (absent)", "train.steps: (absent) -> 5"
    ]  # fmt: skip
    assert configuration.diff(old, old) == []

"""Layers of configuration, and one-line messages that name the place of an error."""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptsmith import config as configuration
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run.layout import read_config


class Optimizer(BaseModel):
    """How weights move."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, description="Peak rate, 100% after warmup.")
    betas: tuple[float, float] = (0.9, 0.95)


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    data: Path
    """Folder of a prepared corpus."""
    model: ModelConfig = ModelConfig.preset("tiny")
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    tokens: int | None = None
    resume: bool = False
    stop: tuple[str, ...] = ()
    checkpoint: Literal["last", "best"] | int = "last"
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.resume and self.tokens == 0:
            raise ValueError("nothing to resume with tokens 0")
        return self


def load(*argv: str, kind: type[Any] = Recipe, **options: Any) -> Any:
    return configuration.load_config(
        kind, argv, prog="gptsmith test", description="About 5%.", **options
    )


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def rejected(*argv: str, kind: type[Any] = Recipe) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load(*argv, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) in (ValueError, FileNotFoundError, IsADirectoryError)
    return message


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
        tmp_path, "data: 2024\noptimizer: {learning_rate: 1e-3, betas: [0.8, 9e-1]}\nnote: no\n"
    )
    config = load(recipe, "--tokens", "1e6", "--stop", "a b", "--stop", "-", "--resume")
    assert (config.data, config.note, config.tokens) == (Path("2024"), "no", 1_000_000)
    assert config.optimizer == Optimizer(learning_rate=1e-3, betas=(0.8, 0.9))
    assert config.stop == ("a b", "-")
    assert config.resume
    assert load(write(tmp_path, "data: 2001-13-45")).data == Path("2001-13-45")
    assert load(write(tmp_path, "data: a\nstop: [no, 1.50]")).stop == ("no", "1.50")
    assert not load(recipe, "--resume", "--no-resume").resume
    assert load(recipe, "--model.tie_embeddings", "false", "--resume", "true").resume
    assert not load(recipe, "--model.tie_embeddings", "False").model.tie_embeddings
    assert not load(recipe, "--model.tie_embeddings=false").model.tie_embeddings
    assert load(recipe, "--tokens", "10_000", "--tokens", "none").tokens is None
    assert load(recipe, "--optimizer.betas", "0.5", "0.6").optimizer.betas == (0.5, 0.6)
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
    ("text", "message"),
    [
        ("data: a\nmodle: tiny\n", ":2: unknown key 'modle': did you mean 'model'?"),
        ("learning_rate: 1\n", ":1: unknown key 'learning_rate': did you mean 'optimizer.lear"),
        ("optimizer:\n  lerning_rate: 1\n", ":2: unknown key 'lerning_rate': did you mean 'lear"),
        ("zzz: 1\n", ":1: unknown key 'zzz': valid here are data, model, optimizer"),
        ("data: a\ndata: b\n", ":2: data is written twice (first in line 1)"),
        ("data: a\nmodel:\n\tn_layer: 3\n", ":3: a tab where YAML requires spaces"),
        ("data: [a\n", ":2: expected ',' or ']'"),
        ("- a\n- b\n", ":1: a recipe should contain `name: value` lines"),
        ("just words\n", ":1: a recipe should contain `name: value` lines"),
        ("optimizer: adamw\n", ":1: optimizer should contain `name: value` lines"),
        ("model: [1]\n", ":1: model should contain `name: value` lines"),
        ("a: 1\n---\nb: 2\n", ":2: but found another document"),
        ("model:\n  n_layer: many\n", ":2: model.n_layer: should be a valid integer, unable"),
        ("model:\n  n_layer: yes\n", ":2: model.n_layer: should be a valid integer, unable"),
        (
            "model:\n  n_layer: 0\n",
            ":2: model.n_layer: should be greater than or equal to 1, got '0'",
        ),
        ("model:\n  norm: batch\n", "should be 'layernorm' or 'rmsnorm', got 'batch'"),
        ("model: giant\n", ":1: model: no model preset 'giant': choose one of gpt2"),
        ("model:\n  preset: giant\n", ":2: model.preset: no model preset 'giant'"),
        ("data: a\nmodel: {n_embd: 10, n_head: 3}\n", "model: n_embd 10 is not a multiple"),
        ("optimizer:\n  betas: [1, 2, 3]\n", ":2: optimizer.betas: "),
        ("data: !!python/name:os.system x\n", ":1: data: could not determine a constructor"),
        ("data: a\nresume: true\ntokens: 0\n", "nothing to resume with tokens 0"),
        ("optimizer: {}\n", "--data is required"),
        (
            "data: a\nmodel:\n  rope_scaling:\n    factor: 8\n",
            "--model.rope-scaling.rope-type is required with ",
        ),
        ("data: \x00\n", "special characters are not allowed"),
        (
            "data: a\ntokens: 2001-13-45\n",
            ":2: tokens: should be a valid integer, unable to parse string as an integer, "
            "got '2001-13-45'",
        ),
        ("data: &a [*a]\n", ":1: an alias of a nested value"),
        ("stop: &a [*a]\n", ":1: an alias of a nested value"),
        ("optimizer: &o {name: muon}\nmodel: {<<: *o}\n", ":2: `<<` is not supported"),
    ],
)
def test_bad_recipe_is_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    assert message in rejected(write(tmp_path, text))


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
        ("--optimizer.betas 1", "--optimizer.betas: expected 2 arguments"),
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
        ("nowhere.yaml", "nowhere.yaml: no such recipe"),
    ],
)
def test_bad_command_line_is_a_one_line_error(argv: str, message: str) -> None:
    assert message in rejected(*argv.split())


def test_recipe_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"data: \xff\xfe\n")
    assert "not UTF-8 text (byte 6)" in rejected(str(tmp_path / "bytes.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "is a folder, not a recipe" in rejected(str(tmp_path / "folder.yaml"))


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
        more: Base | None = None
        """Further sizes: 10%."""

    with pytest.raises(SystemExit):
        load("--help", kind=Derived)
    text = " ".join(capsys.readouterr().out.split())
    assert "About 5%. options:" in text
    assert "--size INT Of which 50% are used. (default: 1) more: Further sizes: 10%." in text


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("1_000", 1000), ("1.5e3", 1500), ("~", None), ("", None)]
)
def test_yaml_scalar_has_the_type_of_its_field(
    tmp_path: Path, text: str, value: int | None
) -> None:
    assert load(write(tmp_path, f"data: a\ntokens: {text}\n")).tokens == value
    assert load(write(tmp_path, f"data: a\nnote: '{text}'\n")).note == text
    if value is not None:
        assert load(write(tmp_path, f"data: a\nnote: {text}\n")).note == text


@pytest.mark.parametrize("text", ["0x10", "1:30", "1.2.3e4", "1e999", "[" * 300 + "]" * 300])
def test_invalid_number_is_rejected_with_its_place(tmp_path: Path, text: str) -> None:
    assert "recipe.yaml:2: tokens: " in rejected(write(tmp_path, f"data: a\ntokens: {text}\n"))


@pytest.mark.parametrize("text", ["yes", "on", "True", "1"])
def test_spellings_of_booleans_in_yaml(tmp_path: Path, text: str) -> None:
    recipe = write(tmp_path, f"data: a\nresume: {text}\n")
    assert load(recipe).resume
    assert not load(recipe, "--no-resume").resume


def test_a_negated_flag_takes_no_value() -> None:
    assert "unexpected argument 'true'" in rejected("--data", "a", "--no-resume", "true")
    assert "--no-resume" in rejected("--data", "a", "--no-resume=true")


@pytest.mark.parametrize(
    "text", ["null", "~", "no", "1.50", "", " a ", "2001-01-01", "a\nb: é", "'"]
)
def test_a_written_configuration_reads_back(tmp_path: Path, text: str) -> None:
    config = load("--data", "a", f"--note={text}", f"--stop={text}", "--tokens", "5")
    dumped = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert load(write(tmp_path, dumped)) == config


def test_read_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "data: a\nmodel: tiny\noptimizer:\n  betas: [0, 1]\n")
    assert configuration.read_recipe(Path(path), Recipe) == [
        configuration.Setting(("data",), Path("a"), f"{path}:1: data"),
        configuration.Setting(("model",), "tiny", f"{path}:2: model"),
        configuration.Setting(("optimizer", "betas"), (0, 1), f"{path}:4: optimizer.betas"),
    ]


# renamed keys


class Train(configuration.Section):
    num_threads: int = Field(1, ge=1)
    total_batch_tokens: int = 0


class Renamed(configuration.Section):
    pad_vocab_multiple: int = 1
    train: Train = Train()


def test_a_recipe_may_use_the_names_of_earlier_versions(tmp_path: Path) -> None:
    old = "pad_vocab: 64\ntrain: {threads: 2, tokens_per_step: 8}\n"
    expected = Renamed(pad_vocab_multiple=64, train=Train(num_threads=2, total_batch_tokens=8))
    assert load(write(tmp_path, old), kind=Renamed) == expected
    new = configuration.rename_keys(yaml.safe_load(old))
    assert Renamed.model_validate(new) == expected
    assert configuration.rename_keys(new) == new


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("train: {threads: 0}", "", ":1: train.threads: should be greater than or equal to 1"),
        (
            "train:\n  num_threads: 2\n  threads: 2\n",
            "",
            ":3: train.threads is written twice (first as num_threads in line 2)",
        ),
        (
            "train:\n  threads: 2\n  num_threads: 2\n",
            "",
            ":3: train.num_threads is written twice (first in line 2)",
        ),
        ("threads: 2", "", ":1: unknown key 'threads': did you mean 'train.num_threads'?"),
        ("", "--train.tokens_per_step 8", "did you mean --train.total-batch-tokens?"),
        ("", "--optim.clip 8", "unknown option --optim.clip (see --help)"),
    ],
)
def test_errors_near_a_renamed_key(tmp_path: Path, text: str, argv: str, message: str) -> None:
    assert message in rejected(write(tmp_path, text), *argv.split(), kind=Renamed)


def test_rename_keys() -> None:
    stored = {"model": {"tied": True, "labels": []}, "eval": {"every": 5}, "every": 1, 2: "x"}
    assert configuration.rename_keys(stored) == {
        "model": {"tie_embeddings": True, "labels": []},
        "eval": {"interval": 5},
        "every": 1,
        2: "x",
    }
    assert configuration.rename_keys({"tied": False}, "model") == {"tie_embeddings": False}
    both = {"optim": {"clip": 1, "max_grad_norm": 2}}
    assert configuration.rename_keys(both) == {"optim": {"max_grad_norm": 2}}
    for old, new in configuration.RENAMED_KEYS.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0], "a key stays in its section"
        assert new not in configuration.RENAMED_KEYS


# fields that were not there

pretraining = partial(load, kind=PretrainConfig)


def test_stored_configuration_keeps_what_was_done_before_a_field_existed(tmp_path: Path) -> None:
    recipe = {"optim": {"kind": "adamw", "learning_rate": 0.01}}
    stored = {"out": "runs/x", "resume": False, **recipe}
    present = {**stored, "optim": {**recipe["optim"], "decay_start": "after-warmup"}}
    for content, expected in (
        (recipe, "after-warmup"), (stored, "first-step"), (present, "after-warmup"),
        ({"out": "runs/x", **recipe}, "after-warmup"),
    ):  # fmt: skip
        path = write(tmp_path, yaml.safe_dump(content, sort_keys=False))
        argv = [path, "--data", "data/x", "--out", "runs/y"]
        assert pretraining(*argv).optim.decay_start == expected
        flag = ["--optim.decay-start", "after-warmup"]  # as every field can be
        assert pretraining(*argv, *flag).optim.decay_start == "after-warmup"
        renamed = configuration.rename_keys(content)
        assert renamed["optim"].get("decay_start", "after-warmup") == expected
    assert configuration.rename_keys(renamed) == renamed
    fields = PretrainConfig.model_fields
    for name in configuration.LEGACY_DEFAULTS:
        section, field = name.split(".")
        assert field in type(fields[section].default).model_fields


# hostile files


@pytest.mark.parametrize(
    "value",
    ['!!float ""', '!!int ""', "!!bool x", "!!timestamp 2024-99-99", "!!binary x", "!!float [1]"],
)
def test_malformed_yaml_scalar_is_one_line_with_its_place(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"train:\n  batch_size: {value}\n")
    assert ".yaml:2: train.batch_size: " in rejected(path, kind=PretrainConfig)
    with pytest.raises(ValueError, match=r"^[^\n]*recipe\.yaml[^\n]*$"):
        read_config(Path(path))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "a: &a {x: {y: 1}}\nb: *a\n",
        "a: &a [*a]\n",
        "a: &a {x: *a}\n",
        "[" * 50_000,
        "{" * 5_000,
        "a: 1\n" * 60_000,
        "a: !!python/object/apply:os.getcwd []\n",
    ],
)
def test_yaml_that_asks_for_too_much_is_rejected_in_one_line(tmp_path: Path, text: str) -> None:
    path = Path(write(tmp_path, text))
    for read in (read_config, partial(configuration.read_recipe, config_class=PretrainConfig)):
        with pytest.raises(ValueError, match=r"^[^\n]*recipe\.yaml[^\n]*$"):
            read(path)


def test_path_given_twice_is_rejected() -> None:
    argv = ["--data", "data/x", "--out", "runs/y", "--data"]
    message = rejected(*argv, "data/z", kind=PretrainConfig)
    assert "--data is given twice (data/x and data/z)" in message
    found = pretraining(*argv, "data/x", "--train.steps", "5", "--train.steps", "6")
    assert (str(found.data), found.train.steps) == ("data/x", 6)


# differences


def test_diff() -> None:
    old = {"model": {"n_layer": 4, "mask": "causal()"}, "seed": 1, "gone": None}
    new = {"model": {"n_layer": 6, "mask": "causal()"}, "seed": 1, "train": {"steps": 5}}
    assert configuration.diff(old, new) == [
        "model.n_layer: 4 -> 6", "gone: None -> (absent)", "train.steps: (absent) -> 5"
    ]  # fmt: skip
    assert configuration.diff(old, old) == []

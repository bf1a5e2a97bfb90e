"""Recipes in YAML: values and their places, keys of earlier versions, hostile files."""

from functools import partial
from pathlib import Path

import pytest
import yaml
from example_config import Recipe, load, rejected, write
from pydantic import Field

from gptsmith import config as configuration
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run.layout import read_config


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
        ("optimizer:\n  momentum: [1, 2]\n", ":2: optimizer.momentum: "),
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


def test_recipe_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"data: \xff\xfe\n")
    assert "not UTF-8 text (byte 6)" in rejected(str(tmp_path / "bytes.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "is a folder, not a recipe" in rejected(str(tmp_path / "folder.yaml"))


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


@pytest.mark.parametrize(
    "text", ["null", "~", "no", "1.50", "", " a ", "2001-01-01", "a\nb: é", "'"]
)
def test_a_written_configuration_reads_back(tmp_path: Path, text: str) -> None:
    config = load("--data", "a", f"--note={text}", f"--stop={text}", "--tokens", "5")
    dumped = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert load(write(tmp_path, dumped)) == config


def test_read_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "data: a\nmodel: tiny\noptimizer:\n  momentum: 0\n")
    assert configuration.read_recipe(Path(path), Recipe) == [
        configuration.Setting(("data",), Path("a"), f"{path}:1: data"),
        configuration.Setting(("model",), "tiny", f"{path}:2: model"),
        configuration.Setting(("optimizer", "momentum"), 0, f"{path}:4: optimizer.momentum"),
    ]


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
        assert load(*argv, kind=PretrainConfig).optim.decay_start == expected
        flag = ["--optim.decay-start", "after-warmup"]  # as every field can be
        changed = load(*argv, *flag, kind=PretrainConfig)
        assert changed.optim.decay_start == "after-warmup"
        renamed = configuration.rename_keys(content)
        assert renamed["optim"].get("decay_start", "after-warmup") == expected
    assert configuration.rename_keys(renamed) == renamed
    fields = PretrainConfig.model_fields
    for name in configuration.LEGACY_DEFAULTS:
        section, field = name.split(".")
        assert field in type(fields[section].default).model_fields


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

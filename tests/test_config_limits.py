"""YAML files that ask for too much time or memory, or cannot be made into values."""

from pathlib import Path

import pytest

from gptsmith.config import read_recipe
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run.layout import read_config


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
def test_yaml_that_asks_for_too_much_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for read in (read_config, lambda path: read_recipe(path, PretrainConfig)):
        with pytest.raises(ValueError, match=r"^[^\n]*a\.yaml[^\n]*$"):
            read(path)


@pytest.mark.parametrize(
    "value", ['!!float ""', '!!int ""', "!!timestamp 2024-99-99", "!!binary x"]
)
def test_values_that_yaml_cannot_make_are_refused_in_one_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"stage: pretrain\nseed: {value}\n")
    with pytest.raises(ValueError, match=r"^[^\n]*config\.yaml[^\n]*$"):
        read_config(path)

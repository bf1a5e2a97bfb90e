"""`gptsmith recipes`: what comes with the package is listed, and printed as it is."""

from pathlib import Path

import pytest

from gptsmith import cli
from gptsmith.commands.recipes import FOLDER, name_of

RECIPES = {name_of(path): path for path in FOLDER.rglob("*") if path.is_file()}


def test_every_recipe_is_listed_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name for name, _ in lines} == RECIPES.keys() >= {"course-tiny", "slurm/pretrain.sbatch"}
    for name, about in lines:
        assert f"# {about}\n" in RECIPES[name].read_text("utf-8")
        assert about.endswith((".", ":")), f"{name}: the first line is a sentence"


@pytest.mark.parametrize("spelling", ["finetune/alpaca", "configs/finetune/alpaca.yaml"])
def test_a_recipe_is_printed_as_it_is(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", spelling]) == 0
    assert capsys.readouterr().out == RECIPES["finetune/alpaca"].read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("corse-tiny", "did you mean course-tiny?"),
        ("alpaca", "did you mean finetune/alpaca?"),
        ("finetune/sms_spam.yaml", "did you mean finetune/sms-spam?"),
        ("zzz", "`gptsmith recipes` lists all"),
    ],
)
def test_another_name_is_an_error_with_the_nearest(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes", name]) == 2
    assert capsys.readouterr().err == f"gptsmith recipes: no recipe {name!r}: {hint}\n"


def test_a_missing_recipe_says_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a user of the wheel, who has no folder configs."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "configs/course-tiny.yaml", "--data", "d", "--out", "r"]) == 2
    assert capsys.readouterr().err == (
        "gptsmith pretrain: configs/course-tiny.yaml: no such recipe "
        "(`gptsmith recipes` lists the built-in ones)\n"
    )

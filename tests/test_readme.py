"""The commands of the README and the Python of the docs are run, with fewer training steps."""

import re
import sys
from pathlib import Path

import pytest
from documented_commands import LITTLE, ROOT, blocks, command_with, run, run_steps, steps

from gptsmith import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
PRETRAINING = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")

CHANGES = {
    r"^gptsmith prepare pydocs": " --max-documents 100",
    r"^gptsmith evaluate .*--tasks skills": " --per-skill 1",
    r"^gptsmith pretrain ": LITTLE,
    r"^gptsmith finetune chat ": f"{LITTLE} --questions 200",
}


def code(language: str, page: str = README) -> list[str]:
    return [block.text for block in blocks(page) if block.language == language]


def test_the_commands_and_the_python_work_in_their_order(tmp_path: Path) -> None:
    todo = [
        step
        for block in blocks(README)
        if block.language in ("bash", "python")
        for step in steps(block, CHANGES)
    ]
    assert {step.kind for step in todo} == {"gptsmith", "bash", "python"}
    printed = run_steps(todo, tmp_path)
    assert "The list" in printed
    assert " ■ ■ ■ ■" in printed


def test_the_library_page_works(tmp_path: Path) -> None:
    """In one process, as in a notebook."""
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    [command] = re.findall(r"`(gptsmith prepare [^`]+)`", LIBRARY)
    run(["bash", "-c", command_with(command, CHANGES)], tmp_path)
    program = "\n".join(code("python", LIBRARY))
    assert "■" in run([sys.executable, "-c", program], tmp_path)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    asked = re.findall(r"\bmake (\w+)", "".join(code("console")))
    assert asked
    assert set(asked) <= set(targets)


def test_every_verb_and_every_recipe_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert {verb for verb in cli.VERBS if f"gptsmith {verb}" not in README} <= {"demo"}
    cli.main(["recipes"])
    assert f"$ gptsmith recipes\n{capsys.readouterr().out}```" in PRETRAINING


PAGES = [p.relative_to(ROOT) for f in (".", "docs", "course") for p in (ROOT / f).glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=map(str, PAGES))
def test_links_are_not_broken(page: Path) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_features_name_tests_that_exist() -> None:
    named = re.findall(
        r"`(tests/\S+\.py)::(test_\w+)`", (ROOT / "docs/features.md").read_text("utf-8")
    )
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=map(str, PAGES))
def test_linked_tests_exist(page: Path) -> None:
    path = ROOT / page
    for test, file in re.findall(r"\[(test_\w+)\]\(([^)#\s]+\.py)\)", path.read_text("utf-8")):
        assert f"\ndef {test}(" in (path.parent / file).read_text("utf-8"), f"{file}::{test}"


def test_each_promise_has_its_limits_and_its_tests() -> None:
    text = (ROOT / "docs/reliability.md").read_text("utf-8")
    *promises, untested = text.split("\n## ")[1:]
    assert untested.startswith("What was not tested\n")
    for promise in promises:
        parts = re.findall(r"^\*\*(\w+)[. ]", promise, re.MULTILINE)
        assert parts == ["Promise", "Limits", "How", "Kept"], promise
        assert "[test_" in promise.partition("**Kept by**")[2], promise

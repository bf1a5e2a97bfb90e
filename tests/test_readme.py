"""The commands of the README and the Python of the docs are run, with fewer training steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from gptsmith import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORKED = ROOT / "tests/support/forked.py"
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")

# The only change: little text, three small steps of training, few measurements.
FEW = "--train.steps 3 --train.seconds none --train.epochs none --train.tokens none"
SMALL = "--train.batch-size 4 --train.total-batch-tokens none"
LITTLE = f" {FEW} {SMALL} --eval.tokens 2000 --eval.sample-tokens 8"
SHARES = "--val-fraction 0.2 --test-fraction 0.2"  # of sets as small as those below
SHORTER = {
    r"^gptsmith prepare pydocs": " --max-documents 100",
    r"^gptsmith evaluate .*--tasks skills": " --per-skill 1",
    r"^gptsmith pretrain (?!.*--resume)": LITTLE,
    r"^gptsmith finetune chat .*--data skills": f"{LITTLE} --questions 200",
    r"^gptsmith finetune (chat|text)": LITTLE,
    r"^gptsmith finetune instruct": f"{LITTLE} --responses 2 {SHARES}",
    r"^gptsmith finetune classify": f" {FEW}",
    r"^gptsmith finetune reward": f" {FEW} --questions 50 --prompts-per-step 4 --val-prompts 8",
    r"^gptsmith finetune preference": f" {FEW} --eval.sample-tokens 8 {SHARES.split(' --')[0]}",
}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def shorter(command: str) -> str:
    for pattern, flags in SHORTER.items():
        if re.search(pattern, command):
            return command + flags
    return command


def run(command: list[str], folder: Path, text: str = "") -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, input=text, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of a newcomer: the recipes, and small sets of their own to tune on."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "README.md").symlink_to(ROOT / "README.md")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(40)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "No."} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts = [f"{'spam' if i % 2 else 'ham'}\ttext number {i}\n" for i in range(60)]
    (folder / "sms.tsv").write_text("".join(texts))
    return folder


def test_the_commands_work_in_their_order(folder: Path) -> None:
    """Those with a pipe by bash; the others in forks of one process, which imports torch once."""
    found = [shorter(command) for command in commands()]
    seen = ""
    for piped, group in groupby(found, lambda command: "|" in command):
        if piped:
            seen += "".join(run(["bash", "-c", command], folder) for command in group)
        else:
            words = [shlex.split(command, comments=True) for command in group]
            assert {program for program, *_ in words} == {"gptsmith"}
            argv = json.dumps([arguments for _, *arguments in words])
            seen += run([sys.executable, str(FORKED)], folder, argv)
    assert "The list" in seen


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples_run(block: str, tmp_path: Path) -> None:
    assert run([sys.executable, "-c", block], tmp_path)


def test_the_library_page_works(tmp_path: Path) -> None:
    """In one process, as in a notebook."""
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    [command] = re.findall(r"`(gptsmith prepare [^`]+)`", LIBRARY)
    run(["bash", "-c", shorter(command)], tmp_path)
    code = "\n".join(blocks("python", LIBRARY))
    assert "■" in run([sys.executable, "-c", code], tmp_path)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    asked = re.findall(r"\bmake (\w+)", "".join(blocks("console")))
    assert asked
    assert set(asked) <= set(targets)


def test_every_verb_and_every_recipe_is_shown() -> None:
    assert {verb for verb in cli.VERBS if f"gptsmith {verb}" not in README} <= {"demo"}
    listed = set(re.findall(r"^\| `configs/([\w-]+\.yaml)`", README, re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "configs").glob("*.yaml")}


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

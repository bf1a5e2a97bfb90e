"""The code of a page, run as its reader would run it, with less work.

A page is a list of fenced blocks. Those of bash are commands, one per line; those of Python are
programs, or, if their first line is a comment with a name (`# rules.py`), files to write.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FORKED = Path(__file__).with_name("forked.py")

# Few small steps and few measurements; later words overrule those of the page.
FEW = "--train.steps 3 --train.seconds none --train.epochs none --train.tokens none"
SMALL = "--train.batch-size 4 --train.total-batch-tokens none"
LITTLE = f"{FEW} {SMALL} --eval.tokens 500 --eval.sample-tokens 8"


class Block(NamedTuple):
    """A fenced block of a page. section: the last heading above it."""

    language: str
    text: str
    section: str


class Step(NamedTuple):
    """Something to run: words of gptsmith, a program of Python, or a command of the shell."""

    kind: str
    what: str | list[str]


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page of Markdown."""
    section = ""
    pattern = r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```"
    for heading, language, text in re.findall(pattern, page, re.MULTILINE | re.DOTALL):
        section = heading or section
        if not heading:
            yield Block(language, text, section)


def commands(text: str) -> list[str]:
    """The commands of a block, one per line, with continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def steps(block: Block, changes: Mapping[str, str]) -> Iterator[Step]:
    """What a block of bash or Python runs. changes: pattern -> words to add to such a command."""
    if block.language == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)):
        yield Step("file", [name[1], block.text])
    elif block.language == "python":
        yield Step("python", block.text)
    elif block.language == "bash":
        for command in commands(block.text):
            yield _step(command_with(command, changes))


def _step(command: str) -> Step:
    """Words of gptsmith, perhaps after NAME=value, or a command of the shell."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition("  #")[0])
    words = shlex.split(command, comments=True)
    if found := re.match(r"((?:\w+=\S+ )*)gptsmith ", bare):
        assigned = found[1].split()
        if not re.search(r"[|&;<>$]", bare):
            return Step("gptsmith", [*assigned, *words[len(assigned) + 1 :]])
    return Step("bash", command)


def command_with(command: str, changes: Mapping[str, str]) -> str:
    """The command with the words of the first pattern that is found in it."""
    added = next((words for pattern, words in changes.items() if re.search(pattern, command)), "")
    before, mark, comment = command.partition("  #")
    return f"{before} {added}{mark}{comment}" if added else command


def run(command: list[str], folder: Path, text: str = "") -> str:
    """Standard output of a command, which must succeed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, input=text, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_steps(todo: list[Step], folder: Path) -> str:
    """Standard output of all steps, run in their order and in forks of one process, which imports
    torch once."""
    return run([sys.executable, str(FORKED)], folder, json.dumps(todo))

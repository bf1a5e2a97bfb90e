"""Run the commands of the documentation, and write below each what it prints.

    python -m docs.outputs [PAGE ...]           rewrite the pages (default: all in PAGES)
    python -m docs.outputs --check [PAGE ...]   say what differs from them; then exit code 1
    --folder DIR                                run in DIR and keep it; pages that the given ones
                                                build on have run there already

In a page, a block that begins with ```console has commands after `$ `, each followed by its output.
The commands run in one temporary folder, in the order of PAGES, after those of the pages that a
page builds on; with --folder, those of the given pages in their order. Numbers are not compared,
nor is what depends on the machine: see VARYING.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from docs.difference import PROGRESS, difference
from docs.inputs import DATA, make_inputs

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WIDTH = 90  # columns
HEAD, TAIL = 22, 8  # lines that are kept of a longer output

# Makes runs/demo and runs/demo-chat, in minutes; those of `make demo` are taken where they are.
DEMO = "gptsmith demo --folder demo"

# page -> what it builds on: other pages, and the runs of DEMO
PAGES: dict[str, tuple[str, ...]] = {
    "data.md": (),
    "pretraining.md": ("data.md",),
    "model.md": ("pretraining.md",),
    "tuning.md": (DEMO,),
    "generation.md": (DEMO,),
    "evaluation.md": (DEMO,),
    "preference.md": (DEMO,),
    "reward.md": (DEMO,),
    "serving.md": (DEMO,),
    "import-export.md": (DEMO,),
    "scaling.md": ("data.md",),
    "planning.md": ("data.md",),
    "reliability.md": ("data.md",),
}

# docs/images/NAME -> the picture that the commands made
PICTURES = {
    "corpus.png": "corpus.png",
    "masks.png": "masks.png",
    "pretraining.png": "runs/pydocs/curves.png",
    "evaluation.png": "skills.png",
}

# Commands whose words, too, depend on the machine: rounding decides what a model writes, and the
# machine what can be trained on it. It is checked that they succeed, or are
# refused, as on the page.
VARYING = re.compile(
    r"gptsmith (generate|chat|classify|finetune reward|plan --data|doctor)\b|.*\| gptsmith |curl "
    r"|python -c .*transformers"
)
# What is refused: exit code 2.
_REFUSED = re.compile(r"gptsmith \w+: ", re.MULTILINE)

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Command(NamedTuple):
    """A command of a page, with the output that the page shows."""

    text: str
    output: str

    @property
    def line(self) -> str:
        """The command without its line breaks."""
        return " ".join(self.text.replace("\\\n", " ").split())

    @property
    def is_refused(self) -> bool:
        """Whether the page shows an error of one line."""
        return bool(_REFUSED.match(self.output))


def blocks(page: Path) -> list[str]:
    """The blocks of a page that have commands."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> list[Command]:
    """The commands of a block, in order."""
    found: list[tuple[list[str], list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif not found:
            raise ValueError(f"a block of commands begins with {line!r}: expected `$ command`")
        else:
            command, output = found[-1]
            (command if command[-1].endswith("\\") and not output else output).append(line)
    return [Command("\n".join(command), "\n".join(output)) for command, output in found]


# --- running -------------------------------------------------------------------------------------


class Shell:
    """Runs commands in a folder; servers go on until `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[subprocess.Popen[str]] = []
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = os.environ | {
            "PATH": path, "COLUMNS": str(WIDTH), "TERM": "dumb", "PYTHONWARNINGS": "ignore",
            "GPTSMITH_DATA": str(DATA), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def run(self, command: str) -> tuple[str, bool]:
        """What a command prints on both streams, and whether it refused its input. ValueError if it
        fails in another way."""
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        if command.startswith("gptsmith serve"):
            self.servers.append(process)
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "Ctrl-C stops" in line:
                    return self._clean("".join(lines)), False
            raise ValueError(f"{command}: ended with {process.wait()}\n{''.join(lines)}")
        printed, _ = process.communicate()
        refused = process.returncode == 2 and bool(_REFUSED.search(printed))
        if process.returncode and not refused:
            raise ValueError(f"{command}: ended with {process.returncode}\n{printed}")
        return self._clean(printed), refused

    def stop(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
        self.servers.clear()

    def _clean(self, printed: str) -> str:
        """Without colours and this folder's name."""
        text = _ESCAPES.sub("", printed).replace(f"{self.folder}/", "")
        if "```" in text:
            raise ValueError(f"an output would end its block: {text}")
        return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def shown(printed: str) -> str:
    """An output as a page shows it: long lines are broken as in a terminal, and many lines cut."""
    lines = [
        part.rstrip()
        for line in _thinned(printed.splitlines())
        for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False) or [""]
    ]
    if len(lines) > HEAD + TAIL + 1:
        lines = [*lines[:HEAD], "...", *lines[-TAIL:]]
    return "\n".join(lines)


def _thinned(lines: Sequence[str]) -> Iterator[str]:
    """The lines; of progress in a row, the first and the last."""
    for is_progress, group in groupby(lines, lambda line: bool(PROGRESS.match(line))):
        row = list(group)
        yield from (row[0], "...", row[-1]) if is_progress and len(row) > 3 else row


# --- pages ---------------------------------------------------------------------------------------


def rewrite(page: Path, shell: Shell) -> None:
    """Run the commands of a page and replace their outputs."""

    def block(match: re.Match[str]) -> str:
        lines = []
        for command in commands(match[1]):
            lines.append(f"$ {command.text}\n")
            printed, refused = shell.run(command.text)
            if refused and command.output and not command.is_refused:  # a new one has no output
                raise ValueError(f"{page.name}: $ {command.line}\n{printed}")
            if output := shown(printed):
                lines.append(f"{output}\n")
        return f"```console\n{''.join(lines)}```"

    text = _BLOCK.sub(block, page.read_text(encoding="utf-8"))
    shell.stop()
    page.write_text(text, encoding="utf-8")


def check(page: Path, shell: Shell) -> Iterator[str]:
    """Run the commands of a page; what differs from the page, a message for each command."""
    for block in blocks(page):
        for command in commands(block):
            printed, refused = shell.run(command.text)
            if refused != command.is_refused:
                yield f"{page.name}: $ {command.line}\n{printed}"
            elif VARYING.match(command.line):
                pass
            elif (found := difference(command.output, printed)) is not None:
                yield f"{page.name}: $ {command.line}\n  page:    {found[0]}\n  printed: {found[1]}"
    shell.stop()


def in_order(names: Sequence[str]) -> list[str]:
    """The pages and those that they build on, in the order in which they run."""
    needed = set(names)
    for name in reversed(PAGES):
        if name in needed:
            needed.update(PAGES[name])
    return [name for name in PAGES if name in needed]


def copy_pictures(folder: Path) -> None:
    """The pictures that the commands made, in fewer colours, to docs/images."""
    from PIL import Image  # comes with matplotlib

    for name, made in PICTURES.items():
        if (folder / made).is_file():
            picture = Image.open(folder / made).convert("RGB")
            picture.thumbnail((1100, 1100))
            path = DOCS / "images" / name
            path.parent.mkdir(exist_ok=True)
            picture.quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)
            if path.stat().st_size > 80_000:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes: at most 80,000")


@contextmanager
def working_folder(kept: Path | None) -> Iterator[Path]:
    """A folder with the inputs of the pages: `kept`, or a temporary one."""
    if kept is not None:
        if not kept.exists():
            kept.mkdir(parents=True)
            make_inputs(kept)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        yield Path(name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the commands of the documentation.")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="data.md ... (default: all)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=Path, help="run here, and keep what is made")
    options = parser.parse_args(argv)
    names = [Path(page).name for page in options.pages] or list(PAGES)
    if unknown := set(names) - set(PAGES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PAGES)}")
    found = 0
    with working_folder(options.folder) as folder:
        shell = Shell(folder)
        order = names if options.folder else in_order(names)
        made = (folder / "runs" / "demo-chat" / "model.safetensors").is_file()
        try:
            if not made and any(DEMO in PAGES[name] for name in order):
                shell.run(DEMO)
            for name in order:
                print(f"{name} ...", file=sys.stderr)
                if name in names and not options.check:
                    rewrite(DOCS / name, shell)
                else:  # of a page that others build on, the commands have to succeed only
                    for message in check(DOCS / name, shell):
                        if name in names:
                            print(message)
                            found += 1
        finally:
            shell.stop()
        if not options.check:
            copy_pictures(folder)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

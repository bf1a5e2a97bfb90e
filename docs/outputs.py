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
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
DATA = ROOT / "tests" / "fixtures" / "data"
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
# Lines that come with the clock.
_PROGRESS = re.compile(r"step [\d,]+(/[\d,]+)? · |preparing: |\w[\w ()-]*: [\d,]+ of [\d,]+$")
_MACHINE = re.compile(r"precision: |torch\.compile: |training: .*shortened")
# What is refused: exit code 2.
_REFUSED = re.compile(r"gptsmith \w+: ", re.MULTILINE)

RULE = """\
def strided(b, h, q, k):
    return (k <= q) & ((q - k < 16) | ((q - k) % 16 == 0))
"""

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NUMBER = re.compile(r"\b[0-9a-f]{12,}\b|[+-]?\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?")
_UNIT = re.compile(r"(?<=0) ?(?:B|[kKMG]i?B|[mu]?s|min|h)\b")
_PLURAL = re.compile(r"(?<=0 )([a-z]+)s\b")
_RULES = re.compile(r"[─-╿▀-▟]+")  # box drawing and blocks


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
    for is_progress, group in groupby(lines, lambda line: bool(_PROGRESS.match(line))):
        row = list(group)
        yield from (row[0], "...", row[-1]) if is_progress and len(row) > 3 else row


# --- comparing -----------------------------------------------------------------------------------


def difference(expected: str, printed: str) -> tuple[str, str] | None:
    """The first lines that differ, of what a page shows and of what was printed; None if the same
    words are in the same order, apart from numbers, units and progress.

    Where a page has a line `...`, any words may have been printed.
    """
    first, *others = (_words(part) for part in re.split(r"^\.\.\.$", expected, flags=re.MULTILINE))
    new = _words(printed)
    if not others:
        return _first(first, new)
    if found := _first(first, new[: len(first)]):
        return found
    rest = new[len(first) :]
    for part in others[:-1]:
        words = [word for word, _ in part]
        starts = range(len(rest) - len(words) + 1)
        at = next((i for i in starts if [w for w, _ in rest[i : i + len(words)]] == words), None)
        if at is None:
            return part[0][1], "(these words are not there)"
        rest = rest[at + len(words) :]
    last = others[-1]
    return _first(last, rest[len(rest) - len(last) :] if len(last) <= len(rest) else rest)


def _words(text: str) -> list[tuple[str, str]]:
    """Each word without numbers, and its line. Equal lines in a row count as one: how many
    checkpoints there are depends on the clock."""
    words: list[tuple[str, str]] = []
    before = ""
    for line in text.splitlines():
        masked = _UNIT.sub("", _NUMBER.sub("0", _RULES.sub(" ", line)))
        masked = _PLURAL.sub(r"\1", masked)
        masked = " ".join(masked.split())
        if not _PROGRESS.match(line) and not _MACHINE.match(line) and masked != before:
            words += [(word, line) for word in masked.split()]
            before = masked
    return words


def _first(
    old: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]]
) -> tuple[str, str] | None:
    """The lines of the first words that differ."""
    for (a, line), (b, other) in zip_longest(old, new, fillvalue=("", "")):
        if a != b:
            return line, other
    return None


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


def make_inputs(folder: Path, demo: Path = ROOT) -> None:
    """Files of a reader's own, which the pages use, and the place of the demo's runs.

    demo: the folder of a demo whose runs are copied, if they are there.
    """
    (folder / "runs").mkdir()
    for name in ("demo", "demo-chat"):
        (folder / "runs" / name).symlink_to(Path("..", "demo", "runs", name))
    if (demo / "runs" / "demo-chat" / "model.safetensors").is_file():
        for name in ("demo", "demo-chat"):
            shutil.copytree(demo / "runs" / name, folder / "demo" / "runs" / name)
    (folder / "README.md").symlink_to(ROOT / "README.md")
    (folder / "configs").symlink_to(ROOT / "configs")
    rows = [
        json.dumps({"title": f"Note {i}", "text": f"Note {i}: {i} + {i} is {2 * i}."})
        for i in range(1, 41)
    ]
    rows[1] = rows[1][:-12]  # as if the disk had been full
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    pairs = [
        dict(prompt=f"What is {a} + {b}?", chosen=f"{a + b}", rejected=f"It is {a - b}, I guess.")
        for a in range(3, 13)
        for b in range(1, 9)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    (folder / "rules.py").write_text(RULE)
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    chats = [
        (f"When does the {place} open on {day}?", f"At {hour}.", "And close?", f"At {hour + 8}.")
        for hour, place in enumerate(("bakery", "market", "pool", "library", "museum"), 6)
        for day in days
    ]
    rules = (
        "Please shower before you swim, walk at the edge, keep bottles of glass in your locker, "
        "leave the lanes to those who train, dive at the deep end only, watch your children, "
        "bring a towel of your own, and leave when the bell rings, a quarter of an hour before we "
        "close."
    )
    chats[1] = ("What are the rules of the pool?", rules, "Thank you!", "You are welcome.")
    with (folder / "chat.jsonl").open("w") as file:  # one answer is longer than the demo's context
        for chat in chats:
            turns = zip(("user", "assistant") * 2, chat, strict=True)
            messages = [dict(role=role, content=content) for role, content in turns]
            file.write(f"{json.dumps(dict(messages=messages))}\n")
    shutil.copy(DATA / "sms_spam" / "SMSSpamCollection", folder / "sms.tsv")


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

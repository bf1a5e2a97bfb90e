"""Damaged files for every parser of files from elsewhere, each opened in a process with limits.

    python tests/fuzz/run.py --inputs 20000           make fuzz
    python tests/fuzz/run.py --inputs 500 --parser template --seed 7 --keep found

An input is a folder of seeds/ (made by make_seeds.py) or of fixtures/landed with one file changed.
What is promised of it: a result, or one of the errors that the command line shows in one line;
nothing on standard error, within 5 s of processor time and 1 GB. Everything else is counted and
shown, and the exit code is 1. The same --seed gives the same inputs; --keep copies the offending
folders.
"""

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
LANDED = HERE.parent / "fixtures" / "landed"
SECONDS, BYTES = 5.0, 1 << 30
PATIENCE = 60.0  # after which a process that does not answer is killed
PARSERS = (
    "template", "tokenizer", "rows", "conversations", "documents", "corpus", "model", "adapter",
    "run", "recipe",
)  # fmt: skip

# --- the process that opens the files ------------------------------------------------------------


def serve() -> None:
    """Answer each line [parser, folder] with a line [kind, detail, seconds, bytes]."""
    import resource
    import warnings

    import parsers  # type: ignore[import-not-found]

    from gptsmith.cli import WRONG_INPUT, WRONG_NAMES

    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # a file is closed when it is forgotten
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed counts as noise
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + 6 * BYTES  # before the machine suffers
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        parser, folder = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of memory
        started = _processor_time()
        kind = detail = ""
        try:
            parsers.PARSERS[parser](Path(folder))
            kind = "result"
        except BaseException as error:
            wrong = isinstance(error, WRONG_INPUT) or getattr(error, "errno", 0) in WRONG_NAMES
            kind = "rejected" if wrong else type(error).__name__
            where = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"{Path(where.filename).name}:{where.lineno}: {' '.join(str(error).split())}"
        seconds = _processor_time() - started
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
        replies.write(json.dumps([kind, detail[:300], seconds, peak]) + "\n")
        replies.flush()


def _processor_time() -> float:
    """Seconds of this process and of its workers."""
    import resource

    from gptsmith import sandbox

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for worker in sandbox._running:
        fields = Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Child:
    def __init__(self, noise: Path) -> None:
        self.noise, self.last, self.detail = noise, "", ""
        self.start()

    def start(self) -> None:
        with self.noise.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def open(self, parser: str, folder: Path) -> tuple[str, str]:
        """What is wrong with how the folder was opened, and details; "" if nothing is."""
        before = self.noise.stat().st_size
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([parser, str(folder)]) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            code = self.process.wait()
            noise = self.noise.read_text(errors="replace")[before:][-200:]
            self.start()
            return ("crash", f"exit code {code} {noise}") if ready else ("hangs", "")
        kind, detail, seconds, peak = json.loads(line)
        if self.noise.stat().st_size > before:
            return "noise", self.noise.read_text(errors="replace")[before:][:300]
        if kind not in ("result", "rejected"):
            return kind, detail
        if seconds > SECONDS:
            return "slow", f"{seconds:.1f} s, {detail}"
        if peak > BYTES:
            return "memory", f"{peak >> 20} MB, {detail}"
        self.last, self.detail = kind, detail
        return "", ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


# --- inputs --------------------------------------------------------------------------------------


def seeds(parser: str) -> list[Path]:
    """The folders that the parser can open."""
    found = sorted((HERE / "seeds" / parser).glob("*"))
    if parser == "corpus":
        found.append(LANDED / "corpus")
    if parser == "adapter":
        found.append(LANDED / "lora-finished")
    if parser == "run":
        found += sorted(path.parent for path in LANDED.glob("*/config.yaml"))
    return found


def changeable(parser: str, folder: Path) -> list[Path]:
    """The files that are changed: those that the parser reads."""
    unread = (".png", ".csv", ".md", ".txt", "metrics.jsonl", ".lock")
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if parser == "run":
        found = [path for path in found if not path.name.endswith(unread)]
    if parser == "adapter":
        found = [path for path in found if path.parent.name == "adapter"]
    return found


def make_input(parser: str, folder: Path, target: Path, rng: random.Random) -> str:
    """A copy of a seed with one file changed; the name of the file."""
    import mutations  # type: ignore[import-not-found]

    shutil.copytree(folder, target)
    paths = changeable(parser, target)
    path = rng.choice(paths)
    name = path.name
    same = [
        p for seed in seeds(parser) for p in changeable(parser, seed) if p.suffix == path.suffix
    ]
    others = [p.read_bytes() for p in rng.sample(same, min(3, len(same)))]
    path.write_bytes(mutations.mutated(path.read_bytes(), name, others, rng))
    return name


def run(names: list[str], inputs: int, seed: int, keep: Path | None) -> int:
    """The number of inputs that broke a promise; each kind is printed."""
    found: Counter[tuple[str, ...]] = Counter()
    opened: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        child = Child(Path(scratch) / "noise")
        for parser in names:  # undamaged, first
            for folder in seeds(parser):
                problem = child.open(parser, folder)
                if problem[0] or child.last != "result":
                    print(f"{parser}: seed {folder.name}: {problem} {child.detail}")
                    found[parser, "seed", folder.name] += 1
        for number in range(inputs):
            parser = names[number % len(names)]
            rng = random.Random(f"{seed}/{parser}/{number}")
            folder, target = rng.choice(seeds(parser)), Path(scratch) / "input"
            name = make_input(parser, folder, target, rng)
            kind, detail = child.open(parser, target)
            opened[f"{parser} {kind or child.last}"] += 1
            if kind:
                key = (parser, kind, detail.partition(": ")[0] if kind != "noise" else "")
                found[key] += 1
                if found[key] <= 3:
                    print(f"{parser} {number} {folder.name}/{name}: {kind} {detail}", flush=True)
                    if keep:
                        shutil.copytree(
                            target, keep / f"{parser}-{kind}-{number}", dirs_exist_ok=True
                        )
            shutil.rmtree(target)
        child.close()
    for name, count in sorted(opened.items()):
        print(f"{count:7,} {name}")
    print(f"{inputs:,} inputs, {found.total()} outside the promise")
    return found.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parser", choices=PARSERS, action="append")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    return int(run(options.parser or [*PARSERS], options.inputs, options.seed, options.keep) > 0)


if __name__ == "__main__":
    sys.exit(main())

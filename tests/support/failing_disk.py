"""Commands on a disk that fails, or dies, at a chosen call: failing_disk.c and a forking server.

The server imports what its children had to import, so that a command takes tenths of a second and
not seconds; it does nothing else that a child could inherit.
"""

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
AVAILABLE = COMPILER is not None and sys.platform == "linux"

KILL, SHORT = 0, -1  # in place of an errno
# Kinds of calls. NAMES: mkdir, rename, truncate; WRITER: opening a file to write, and fsync.
READ, REMOVE, NAMES, WRITER = 1, 2, 4, 8


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call that changes a file: an errno, KILL or SHORT.

    lasting: at all later ones, too.
    """

    error: int
    lasting: bool = False

    @property
    def ignored(self) -> int:
        """Kinds of calls that it does not touch: a full disk can still be read and emptied."""
        kinds = {
            errno.ENOSPC: READ | REMOVE, errno.EIO: REMOVE, errno.EINTR: REMOVE | NAMES,
            SHORT: READ | REMOVE | NAMES | WRITER,
        }  # fmt: skip
        return kinds.get(self.error, 0)

    def __str__(self) -> str:
        name = {KILL: "SIGKILL", SHORT: "short"}.get(self.error) or errno.errorcode[self.error]
        return name + (" lasting" if self.lasting else "")


@dataclass(frozen=True)
class Outcome:
    """What a command did. log: its calls, one a line; failed: the one that was touched."""

    code: int
    stdout: str
    stderr: str
    log: str
    failed: str

    def calls(self, fault: Fault) -> int:
        """The number of calls that the fault can touch."""
        kinds = [int(line.partition(" ")[0]) for line in self.log.splitlines()]
        return sum(not kind & fault.ignored for kind in kinds)

    @property
    def message(self) -> str:
        """The last line of standard error."""
        return self.stderr.rstrip("\n").rpartition("\n")[2]


class Disk:
    """Runs commands in `folder`, the only one in which calls are counted and fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._own = tempfile.TemporaryDirectory()
        library = Path(self._own.name) / "failing_disk.so"
        build = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"]
        subprocess.run(build, check=True, capture_output=True)
        before = [library, *filter(None, [os.environ.get("LD_PRELOAD")])]
        self._server = subprocess.Popen(
            [sys.executable, __file__, library],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "LD_PRELOAD": ":".join(map(str, before)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._read() == {"ready": True}

    def run(
        self, words: Sequence[str | Path], fault: Fault = Fault(KILL), at: int = 0, *,
        seconds: float | None = None, text: str = "",
    ) -> Outcome:  # fmt: skip
        """`gptsmith WORDS`. at: number of the call that fails (0: none). text: standard input.

        seconds: it is killed after so many, if not before (by SIGALRM, which nothing handles).
        """
        request = {
            "words": [*map(str, words)], "folder": str(self.folder), "at": at, "error": fault.error,
            "lasting": fault.lasting, "ignored": fault.ignored, "seconds": seconds, "text": text,
        }  # fmt: skip
        assert self._server.stdin is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Outcome(**self._read())

    def _read(self) -> dict:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, f"the server ended: {self._server.wait()}"
        return json.loads(line)

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.communicate()
        self._own.cleanup()


# --- comparing -----------------------------------------------------------------------------------

# What depends on the clock, on the number of starts, or on the process.
_TIMES = "seconds|tokens_per_second|peak_memory_mb|warmup_seconds|train_sampling_share|crc32"
_TIMED = re.compile(rf'"({_TIMES})": [^,}}\n]+,?')


def content(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without what depends on the clock or on the number of starts."""
    return dict(_content(folder))


def _content(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".lock" or "tensorboard" in path.parts or not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".csv", ".md"):
            data = _timeless(path, data.decode()).encode()
        yield name, data


def _timeless(path: Path, text: str) -> str:
    lines = text.splitlines(keepends=True)
    if path.name == "metrics.jsonl":
        lines = [line for line in lines if '"event": "note"' not in line]  # of each start
    if path.name == "report.md":
        lines = [line for line in lines if not line.startswith("- resume: ")]
        lines = [re.sub(r"\| *[\d,.]+ \|$", "|", line) for line in lines]  # the last column
    if path.name == "metrics.csv":
        names = lines[0].rstrip("\n").split(",")
        timed = ("seconds", "tokens_per", "train_sampling_share")
        kept = [i for i, name in enumerate(names) if not name.startswith(timed)]
        lines = [",".join(line.rstrip("\n").split(",")[i] for i in kept) + "\n" for line in lines]
    if path.name == "manifest.json" and path.parent.name.startswith("step-"):
        manifest = json.loads(text)
        manifest["files"].pop("state.json")  # it has the seconds
        return json.dumps(manifest)
    return _TIMED.sub("", "".join(lines))


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Between two `content`s, for a message."""
    texts = []
    for name in sorted(found.keys() | expected.keys()):
        one, two = found.get(name), expected.get(name)
        if one != two:
            texts.append(f"{name}: {_show(one, two)}, expected {_show(two, one)}")
    return "; ".join(texts)


def _show(data: bytes | None, other: bytes | None) -> str:
    """The first line in which a file differs."""
    if data is None:
        return "absent"
    lines, others = data.splitlines(), (other or b"").splitlines()
    first = next((i for i, line in enumerate(lines) if others[i : i + 1] != [line]), len(lines) - 1)
    return f"{len(data)} bytes, {lines[first][:150]!r}" if lines else "empty"


def empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- the server ----------------------------------------------------------------------------------


def serve(library: str) -> None:
    disk = ctypes.CDLL(library)
    disk.disk_share.restype = ctypes.c_void_p
    disk.disk_log.restype = ctypes.c_char_p
    disk.disk_call.restype = ctypes.c_char_p
    disk.disk_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3]
    disk.disk_share()
    answers = os.fdopen(os.dup(1), "w")
    import_all()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            streams = [Path(name) / stream for stream in ("in", "out", "err")]
            streams[0].write_text(request["text"])
            imported = Path(name) / "imported"
            child = os.fork()
            if child == 0:
                _run(disk, request, streams, imported)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if imported.exists():
                for module in imported.read_text().split():
                    with suppress(Exception):
                        import_module(module)
            outcome = Outcome(
                code, *(path.read_text(errors="replace") for path in streams[1:]),
                disk.disk_log().decode(), disk.disk_call().decode(),
            )  # fmt: skip
        print(json.dumps(outcome.__dict__), file=answers, flush=True)


def import_all() -> None:
    """What most commands import."""
    import gptsmith.data.prepare
    import gptsmith.evaluate.tasks
    import gptsmith.interop.gguf
    import gptsmith.interop.hf
    import gptsmith.recipes.chat
    import gptsmith.recipes.classify
    import gptsmith.recipes.instruct
    import gptsmith.recipes.pretrain
    import gptsmith.train.plots  # noqa: F401


def _run(disk: ctypes.CDLL, request: dict, streams: list[Path], imported: Path) -> None:
    known = set(sys.modules)
    code = 70  # not one of gptsmith's: an exception passed its handler
    try:
        for number, path in enumerate(streams):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND * (number > 0)), number)
        sys.stdin = open(0)  # noqa: SIM115 - until the process ends
        os.chdir(request["folder"])
        from gptsmith import cli

        under = f"{request['folder']}/".encode()
        numbers = (request[name] for name in ("at", "error", "lasting", "ignored"))
        disk.disk_arm(under, *map(int, numbers))
        if request["seconds"] is not None:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, request["seconds"]))
        code = cli.main(request["words"])
        sys.stdout.flush()
        sys.stderr.flush()
        imported.write_text("\n".join(name for name in sys.modules if name not in known))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])

"""Contestants of a benchmark in processes of their own, of which only one runs at a time.

Both sides of the pipe are here. Only the standard library is imported, since a contestant may live
in the environment of another program.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT = [17, 4, 99, 1024, 7, 50000, 3, 12]  # a short text in GPT-2's vocabulary


class ProcessGroup:
    """A program and the processes that it starts, all stopped but in its `turn`: some poll while
    they are idle, and would take time from the others.

    The output goes to a temporary file; the end of it is part of the error if the program ends.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, **pipes: Any
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            stderr=self._log,
            **{"stdout": self._log, "stdin": subprocess.DEVNULL, **pipes},
        )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """RuntimeError with the last output if the program ends in its turn."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        except Exception:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.check()
            raise
        finally:
            self._signal(signal.SIGSTOP)

    def check(self) -> None:
        """RuntimeError with the last output if the program has ended."""
        if self.process.poll() is not None:
            self._log.seek(0)
            end = self._log.read()[-3000:].decode(errors="replace")
            raise RuntimeError(f"{self.process.args!r} ended: {self.process.returncode}\n{end}")

    def memory(self) -> float | None:
        """MB of memory of all its processes, shared pages once; None where /proc does not say."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == self.process.pid:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except (OSError, ProcessLookupError):
                continue  # it has ended
        return total * 1024 / 1e6 or None

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Contestant(ProcessGroup):
    """The module benchmarks.MODULE, which calls `answer`, run by any Python."""

    def __init__(
        self,
        python: str,
        module: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [python, "-m", f"benchmarks.{module}", *map(str, arguments)]
        super().__init__(command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            with self.turn():
                self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def measure(self) -> Any:
        """What its `measure` returns."""
        with self.turn():
            assert self.process.stdin
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
            return self._read()

    def _read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.check()
        return json.loads(line)


def answer(prepare: Callable[..., tuple[Callable[[], Any], Any]], *arguments: Any) -> None:
    """The contestant's side: `prepare` returns its measurement, which is made for every line that
    comes, and what is said beforehand."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    measure, ready = prepare(*arguments)
    print(json.dumps(ready), file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=replies, flush=True)


@contextmanager
def closing_all() -> Iterator[list[ProcessGroup]]:
    """A list of groups that end with the block, on SIGTERM too."""
    groups: list[ProcessGroup] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield groups
    finally:
        for group in groups:
            group.close()
        signal.signal(signal.SIGTERM, before)


def imports(python: str, *modules: str) -> bool:
    """Whether this Python has the modules."""
    code = f"import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, {modules!r})))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def vllm_environment(python: str) -> dict[str, str]:
    """What vLLM's installation page advises for speed on a CPU, on all cores, as for the others:
    its own choice leaves one of them to the scheduler."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    libraries = [Path(python).parent.parent / "lib" / "libiomp5.so"]
    libraries += Path("/usr/lib/x86_64-linux-gnu").glob("libtcmalloc_minimal.so.4")
    return {
        "LD_PRELOAD": ":".join(str(library) for library in libraries if library.exists()),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores),
        "VLLM_NO_USAGE_STATS": "1",
    }

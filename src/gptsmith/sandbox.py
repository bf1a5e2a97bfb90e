"""Functions that read what strangers made, run in a worker process with limits of time and memory.

A damaged file can crash the library that reads it, and a small one can ask for hours or for all
memory: nothing inside a process can stop that. So such functions run in another process. It starts
when it is first needed and stays; what ends it costs one ValueError, and the next call starts
another. Functions are named "package.module:function", their arguments and results are JSON values;
a result may be a pair of a JSON value and bytes.

Time is processor time, so a busy machine refuses nothing. Memory is bounded where the system
enforces RLIMIT_AS (Linux); elsewhere only time and the size of results are.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from inspect import isgenerator
from typing import Any

_SECONDS, _MEMORY = 3.0, 384 << 20
_IDLE = 4  # workers that are kept for the next call
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from gptsmith import sandbox; "
    "sandbox.serve()"
)
# One thread each, and no memory set aside for more: address space is what the system can bound.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
}


class StoppedError(ValueError):
    """The worker passed a limit, or crashed."""


def call(
    function: str, *arguments: Any, what: str, seconds: float = _SECONDS, memory: int = _MEMORY
) -> Any:
    """The result of a function in a worker.

    what: the subject of error messages, such as a path. seconds of processor time and bytes of
    memory, beyond what the libraries take, are the limits. A ValueError or OSError of the function
    is raised here again; every other error, a limit that is passed, and a crash are a ValueError.
    """
    with _worker() as worker:
        worker.send(function, arguments, seconds, memory)
        return worker.receive(what)


def stream(
    function: str, *arguments: Any, what: str, seconds: float = _SECONDS, memory: int = _MEMORY
) -> Iterator[Any]:
    """What a generator function yields in a worker, which works ahead by one item.

    Time is that of one item: what an item leaves over, up to `seconds`, is kept for the next ones,
    and each brings a little, in proportion to its bytes. Arguments and errors are those of `call`.
    """
    left = seconds
    with _worker() as worker:
        worker.send(function, arguments, left, memory)
        while (item := worker.receive(what)) is not _END:
            left = max(0.02, min(seconds, left - worker.used + 0.02 + worker.size / 50e6))
            worker.send("", (), left, memory)  # the next one
            yield item


# --- the caller's side ---------------------------------------------------------------------------

_END = object()


class _Worker:
    """A process that answers one request at a time.

    waiting       it has a request to answer
    used, size    seconds and bytes of the last answer
    """

    def __init__(self) -> None:
        self.waiting, self.used, self.size = False, 0.0, 0
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            # -P: files in the working directory are not modules
            [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries write there when they panic
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C is ours
            bufsize=0,
        )

    @property
    def is_usable(self) -> bool:
        return self.is_ours and self._process.poll() is None

    @property
    def is_ours(self) -> bool:
        """False in a process that was forked from the one that started the worker."""
        return self._owner == os.getpid()

    def send(self, function: str, arguments: Any, seconds: float, memory: int) -> None:
        """Request a call or, without a function, the next item."""
        self._limits = (seconds, memory)
        try:
            folder = os.getcwd()
        except FileNotFoundError:  # it was removed
            folder = os.curdir
        request = json.dumps([function, arguments, seconds, memory, folder]).encode()
        self.waiting = True
        assert self._process.stdin
        with suppress(BrokenPipeError):  # `receive` says why it ended
            _write(self._process.stdin.fileno(), len(request).to_bytes(8, "little") + request)

    def receive(self, what: str) -> Any:
        """The answer: a result or _END."""
        seconds, memory = self._limits
        # far beyond the limit of processor time, for what waits or sleeps
        deadline = time.monotonic() + 20 + 5 * seconds
        try:
            length, size = _integers(self._read(16, deadline))
            if length + size > memory:
                self.close()
                raise StoppedError(f"{what} was stopped: its content is over {memory >> 20} MB")
            kind, value, self.used = json.loads(self._read(length, deadline))
            data = self._read(size, deadline)
        except (EOFError, TimeoutError) as error:
            if isinstance(error, EOFError):  # it is ending by itself: the exit code says why
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)
            self.close()
            code = self._process.returncode
            if isinstance(error, TimeoutError) or code == -signal.SIGPROF:
                problem = f"was stopped after {seconds:.2g} s of processor time"
            else:
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                # running out of memory ends some libraries, too
                problem = f"crashed, or needs more than {memory >> 20} MB of memory ({name})"
            raise StoppedError(f"{what} {problem}") from None
        self.waiting, self.size = False, length + size
        match kind:
            case "result":
                return value
            case "pair":
                return value, data
            case "end":
                return _END
            case "ValueError":
                raise ValueError(value)
            case "OSError":
                raise OSError(*value)
            case "MemoryError":
                raise StoppedError(f"{what} was stopped at {memory >> 20} MB of memory")
        raise ValueError(f"{what} cannot be used ({kind}: {value})")

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._process.stdout
        pipe, data, at = self._process.stdout.fileno(), bytearray(size), 0
        while at < size:
            ready = select.poll()
            ready.register(pipe, select.POLLIN)
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            count = os.readv(pipe, [memoryview(data)[at : at + (1 << 20)]])
            if not count:
                raise EOFError
            at += count
        return data

    def close(self) -> None:
        """End the process; in a forked process, only our copies of its pipes."""
        if self.is_ours:
            self._process.kill()  # does nothing to one that has ended
            self._process.wait()
        else:
            self._process.returncode = 0  # not ours to wait for
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        _running.discard(self)


_idle: list[_Worker] = []
_running: set[_Worker] = set()  # keeps those that only a forgotten generator refers to
_lock = threading.RLock()  # a forgotten stream may end at any moment


@contextmanager
def _worker() -> Iterator[_Worker]:
    """A worker for one call; others may be in use at the same time, in other threads or by streams
    that have not ended."""
    with _lock:
        worker = _idle.pop() if _idle else None
    if worker is not None and not worker.is_usable:
        worker.close()
        worker = None
    if worker is None:
        worker = _Worker()
        _running.add(worker)
    try:
        yield worker
    finally:
        with _lock:
            # one that still works on something nobody wants any more is not kept
            if worker.is_usable and not worker.waiting and len(_idle) < _IDLE:
                _idle.append(worker)
            else:
                worker.close()


@atexit.register
def _close_all() -> None:
    _idle.clear()
    for worker in list(_running):
        worker.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    _close_all()


os.register_at_fork(after_in_child=_after_fork)


def _write(pipe: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _integers(data: bytes | bytearray) -> tuple[int, int]:
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")


# --- the worker's side ---------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until the caller is gone. The main function of a worker."""
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a library that prints does not disturb the replies
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base, items = 0, None
    with open(requests, "rb", closefd=False) as file:
        while len(header := file.read(8)) == 8:
            name, arguments, seconds, memory, folder = json.loads(
                file.read(int.from_bytes(header, "little"))
            )
            with suppress(OSError):  # relative paths are the caller's
                os.chdir(folder)
            module, _, function = name.partition(":")
            if module and module not in sys.modules:
                import_module(module)
                base = 0
            base = base or _address_space()
            _bound(seconds, base + memory)
            kind, value, data = _answer(module, function, arguments, items)
            if name:
                items = value if isgenerator(value) else None
                if items is not None:
                    kind, value, data = _answer("", "", (), items)
            if kind not in ("result", "pair"):
                items = None
            used = seconds - _bound(0, None)
            text = json.dumps([kind, value, used]).encode()
            sizes = len(text).to_bytes(8, "little") + len(data).to_bytes(8, "little")
            _write(replies, sizes + text)
            _write(replies, data)
    os._exit(0)


def _answer(module: str, function: str, arguments: Any, items: Any) -> tuple[str, Any, Any]:
    """Kind, value and bytes of a reply."""
    try:
        if not module and items is None:
            return "end", None, b""
        result = getattr(sys.modules[module], function)(*arguments) if module else next(items)
    except StopIteration:
        return "end", None, b""
    except ValueError as error:
        return "ValueError", str(error), b""
    except OSError as error:
        if error.errno is None:
            return "OSError", [str(error)], b""
        return "OSError", [error.errno, error.strerror, error.filename], b""
    except MemoryError:
        return "MemoryError", "", b""
    except BaseException as error:  # a panic of Rust is no Exception
        return type(error).__name__, " ".join(str(error).split())[:200], b""
    if isinstance(result, tuple) and isinstance(result[-1], bytes | bytearray | memoryview):
        return "pair", result[0], result[1]
    return "result", result, b""


def _bound(seconds: float, memory: int | None) -> float:
    """Limit the processor time from now on, and the address space; 0 and None: no limits.

    Returns the seconds that were left.
    """
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = hard if memory is None else memory
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return left


def _address_space() -> int:
    """Bytes of address space of this process; where they are unknown, far more than it has."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 40

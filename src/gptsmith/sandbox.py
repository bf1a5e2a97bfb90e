"""Run functions that read untrusted files in a worker process with limits on time and memory.

A damaged file can crash the library that reads it, and a small one can take hours or all memory;
nothing inside the same process can prevent that. The worker starts when it is first needed and is
kept for later calls. If it crashes or exceeds a limit, the call raises a ValueError and the next
one starts a new worker. Functions are named "package.module:function"; arguments and results are
JSON values, or, for a result, a pair of a JSON value and bytes.

Time is processor time, so the load of the machine does not matter. Memory is limited where the
system enforces RLIMIT_AS (Linux); elsewhere only time and the size of results are.
"""

import atexit
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from inspect import isgenerator
from typing import Any

_SECONDS, _MEMORY = 3.0, 384 << 20
_MAX_IDLE = 4  # workers that are kept for the next call
# One thread per library and no arenas for more: the limit on memory is one on address space.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
}


def python_command(module: str, function: str, argument: str) -> list[str]:
    """The command that starts a Python process in which a function of ours gets a text.

    It imports from the same places as this process, but not, unlike `python -c`, from the working
    directory.
    """
    code = (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
        f"from {module} import {function}; {function}(sys.argv[2])"
    )
    return [sys.executable, "-P", "-c", code, json.dumps(sys.path), argument]


class StoppedError(ValueError):
    """The worker exceeded a limit, or crashed."""


def call(
    function: str,
    *arguments: Any,
    what: str,
    seconds: float = _SECONDS,
    memory: int = _MEMORY,
) -> Any:
    """The result of a function in a worker.

    what: the subject of error messages, such as a path. seconds: limit on processor time. memory:
    limit in bytes, beyond what the libraries themselves take. A ValueError or OSError of the
    function is raised here again; any other error becomes a ValueError, and an exceeded limit or a
    crash a StoppedError.
    """
    with _worker() as worker:
        worker.send(function, arguments, seconds, memory)
        return worker.receive(what)


def stream(
    function: str,
    *arguments: Any,
    what: str,
    seconds: float = _SECONDS,
    memory: int = _MEMORY,
) -> Iterator[Any]:
    """The items that a generator function yields in a worker, which works ahead by one item.

    Time limits refer to one item: time that an item does not use, up to `seconds`, is kept for the
    following ones, and each adds a little in proportion to its bytes. Arguments and errors are
    those of `call`.
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
        self._socket, theirs = socket.socketpair()
        self._answers = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                python_command("gptsmith.sandbox", "serve", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # for libraries that print
                stderr=subprocess.DEVNULL,  # or panic
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is ours
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, function: str, arguments: Any, seconds: float, memory: int) -> None:
        """Request a call or, without a function, the next item."""
        self._limits = (seconds, memory)
        try:
            folder = os.getcwd()
        except FileNotFoundError:  # it was removed
            folder = os.curdir
        self.waiting = True
        # far beyond the limit of processor time, for what waits or sleeps
        self._socket.settimeout(20 + 5 * seconds)
        with suppress(OSError):  # `receive` says why it ended
            self._socket.sendall(_line([function, arguments, seconds, memory, folder]))

    def receive(self, what: str) -> Any:
        """The answer: a result or _END."""
        _, memory = self._limits
        try:
            line = self._answers.readline(memory)
            if not line.endswith(b"\n"):
                raise EOFError if len(line) < memory else MemoryError
            kind, value, self.used, size = json.loads(line)
            if size > memory:
                raise MemoryError
            data = bytearray(size)
            if self._answers.readinto(data) < size:
                raise EOFError
        except (EOFError, OSError, MemoryError) as error:
            raise StoppedError(f"{what} {self._problem(error)}") from None
        self.waiting, self.size = False, len(line) + size
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

    def _problem(self, error: Exception) -> str:
        """End the process and say why there is no answer."""
        seconds, memory = self._limits
        if isinstance(error, EOFError | ConnectionResetError):  # the exit code says why
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        self.close()
        code = self._process.returncode
        if isinstance(error, TimeoutError) or code == -signal.SIGPROF:
            return f"was stopped after {seconds:.2g} s of processor time"
        if isinstance(error, MemoryError):
            return f"was stopped: its content is over {memory >> 20} MB"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        # some libraries abort when memory runs out
        return f"crashed, or needs more than {memory >> 20} MB of memory ({name})"

    def close(self) -> None:
        self._process.kill()  # does nothing to one that has ended
        self._process.wait()
        self._answers.close()
        self._socket.close()
        _running.discard(self)

    def disown(self) -> None:
        """After a fork, close only our copy of the socket: the worker belongs to the parent."""
        self._process.returncode = 0  # not ours to kill and to wait for
        self.close()


_idle: list[_Worker] = []
_running: set[_Worker] = set()  # also those that only an abandoned generator refers to
_lock = threading.RLock()  # garbage collection may end a stream at any moment


@contextmanager
def _worker() -> Iterator[_Worker]:
    """A worker for one call; others may be in use at the same time, in other threads or by streams
    that have not ended."""
    with _lock:
        worker = _idle.pop() if _idle else None
    if worker is not None and not worker.is_alive:
        worker.close()
        worker = None
    if worker is None:
        worker = _Worker()
        _running.add(worker)
    try:
        yield worker
    finally:
        with _lock:
            # a worker that is still busy with an abandoned request is not reused
            if worker.is_alive and not worker.waiting and len(_idle) < _MAX_IDLE:
                _idle.append(worker)
            else:
                worker.close()


def _line(message: list[Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


@atexit.register
def _close_all() -> None:
    _idle.clear()
    for worker in list(_running):
        worker.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    _idle.clear()
    for worker in list(_running):
        worker.disown()


os.register_at_fork(after_in_child=_after_fork)


# --- the worker's side ---------------------------------------------------------------------------


def serve(descriptor: str) -> None:
    """Answer requests until the caller is gone. The main function of a worker.

    descriptor: number of its socket.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), socket.socket(fileno=int(descriptor)) as caller:
        _answer_all(caller)
    os._exit(0)


def _answer_all(caller: socket.socket) -> None:
    base, items = 0, None
    for line in caller.makefile("rb"):
        name, arguments, seconds, memory, folder = json.loads(line)
        with suppress(OSError):  # relative paths are the caller's
            os.chdir(folder)
        module, _, function = name.partition(":")
        if module and module not in sys.modules:
            import_module(module)
            base = 0
        base = base or _address_space()
        _set_limits(seconds, base + memory)
        kind, value, data = _answer(module, function, arguments, items)
        if name:
            items = value if isgenerator(value) else None
            if items is not None:
                kind, value, data = _answer("", "", (), items)
        if kind not in ("result", "pair"):
            items = None
        used = seconds - _set_limits(0, None)
        size = memoryview(data).nbytes
        caller.sendall(_line([kind, value, used, size]))
        caller.sendall(data)


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


def _set_limits(seconds: float, memory: int | None) -> float:
    """Set the limits on processor time, from now on, and on address space; 0 and None: no limit.

    Returns the seconds that were left of the previous limit.
    """
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = hard if memory is None else memory
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return left


def _address_space() -> int:
    """Bytes of address space of this process; if unknown, 1 TB, which makes the limit void."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 40

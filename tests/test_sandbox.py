"""A function in a worker process: its results, its errors, and what ends it."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gptsmith import sandbox

SUPPORT = Path(__file__).resolve().parent / "support"
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")


def call(function: str, *arguments: Any, **limits: Any) -> Any:
    return sandbox.call(f"worker_functions:{function}", *arguments, what="a.txt", **limits)


def test_results_are_json_values_and_bytes() -> None:
    value = {"text": "ünïcode \ud800 \0", "none": None, "list": [1, 2.5, True]}
    assert call("answer", value)[0] == value
    assert call("with_bytes", 0) == ({"size": 0}, b"")
    found, data = call("with_bytes", 3 << 20)
    assert (found, len(data)) == ({"size": 3 << 20}, 3 << 20)


def test_one_process_answers_many_calls() -> None:
    assert len({call("answer")[-1] for _ in range(5)} | {os.getpid()}) == 2


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("ValueError", ValueError, "a.txt: wrong"),
        ("FileNotFoundError", FileNotFoundError, r"\[Errno 2\].*'/nowhere/at/all'"),
        ("KeyError", ValueError, r"a.txt cannot be used \(KeyError: 'x'\)"),
        ("BaseException", ValueError, r"\(BaseException: a panic of another language\)"),
    ],
)
def test_errors_of_the_function_are_raised(how: str, error: Any, message: str) -> None:
    worker = call("answer")[-1]
    with pytest.raises(error, match=message) as caught:
        call("fail", how)
    assert not isinstance(caught.value, sandbox.StoppedError)
    assert call("answer")[-1] == worker  # it lives on


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("loop", "a.txt was stopped after 0.3 s of processor time"),
        ("one long call", "a.txt was stopped after 0.3 s of processor time"),
        ("abort", r"a.txt crashed, or needs .* of memory \(SIGABRT\)"),
        ("exit", r"\(exit code 3\)"),
        ("large result", "its content is over 32 MB"),
        pytest.param("memory", "a.txt was stopped at 32 MB of memory", marks=linux),
        pytest.param("many small", "a.txt was stopped at 32 MB of memory", marks=linux),
    ],
)
def test_what_passes_a_limit_or_crashes_is_an_error_and_the_next_call_works(
    how: str, message: str
) -> None:
    seconds = 0.3 if "0.3" in message else 20
    memory = (32 if "32" in message else 200) << 20
    if how == "large result":  # which the caller finds where the system bounds nothing
        with pytest.raises(sandbox.StoppedError):
            call("fail", how, seconds=seconds, memory=memory)
        return
    with pytest.raises(sandbox.StoppedError, match=message):
        call("fail", how, seconds=seconds, memory=memory)
    assert call("answer", 1)[0] == 1


def test_what_a_library_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("fail", "prints") == "fine"
    assert capfd.readouterr() == ("", "")


def test_streams_yield_items_and_end_early() -> None:
    call("answer")
    assert list(sandbox.stream("worker_functions:count", 4, what="x")) == [0, 1, 2, 3]
    assert list(sandbox.stream("worker_functions:count", 0, what="x")) == []
    items = sandbox.stream("worker_functions:count", 1 << 40, what="x")
    others = sandbox.stream("worker_functions:count", 1 << 40, what="x")
    assert [next(items), next(others), next(items), next(others)] == [0, 0, 1, 1]
    assert call("answer", "between")[0] == "between"
    items.close()
    others.close()
    items = sandbox.stream("worker_functions:count", 2, "ValueError", what="x")
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match=r"a\.txt: wrong"):
        next(items)
    items = sandbox.stream("worker_functions:count", 1, "loop", what="x", seconds=0.2)
    with pytest.raises(sandbox.StoppedError):
        list(items)


def test_a_worker_that_was_killed_is_replaced() -> None:
    os.kill(call("answer")[-1], signal.SIGKILL)
    time.sleep(0.1)
    assert call("answer", 2)[0] == 2


def test_threads_call_at_the_same_time() -> None:
    found: list[Any] = []

    def ask(number: int) -> None:
        found.extend(call("answer", number)[0] for _ in range(20))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(list(range(6)) * 20)


def test_a_forked_process_starts_a_worker_of_its_own() -> None:
    ours = call("answer")[-1]
    half = sandbox.stream("worker_functions:count", 9, what="x")
    assert next(half) == 0
    child = os.fork()
    if not child:
        try:
            half.close()  # does not disturb the parent's
            theirs = call("answer")[-1]
            sandbox._close_all()
            os._exit(0 if theirs != ours else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [*half] == [*range(1, 9)]
    assert call("answer")[-1]


def test_no_worker_outlives_its_caller() -> None:
    code = (
        "import sys; from gptsmith import sandbox; "
        f"sys.path.append({str(SUPPORT)!r}); "
        "print(sandbox.call('worker_functions:answer', what='x')[-1], flush=True); {}"
    )
    for end in ("", "import os; os._exit(1)", "import os, signal; os.kill(os.getpid(), 9)"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(end)], capture_output=True, text=True
        )
        assert done.stderr == ""
        worker = int(done.stdout)
        for _ in range(100):
            try:
                os.kill(worker, 0)
            except ProcessLookupError:
                break
            if os.path.exists(f"/proc/{worker}/stat"):
                with open(f"/proc/{worker}/stat") as file:
                    if file.read().rpartition(")")[2].split()[0] == "Z":
                        break
            time.sleep(0.05)
        else:
            pytest.fail(f"worker {worker} still runs after {end!r}")


def test_a_stream_that_is_forgotten_in_a_cycle_ends_its_worker() -> None:
    def forget() -> None:
        items = sandbox.stream("worker_functions:count", 1 << 40, what="x")
        cycle: list[Any] = [items, next(items)]
        cycle.append(cycle)

    forget()
    gc.collect()
    assert all(worker in sandbox._idle for worker in sandbox._running)


def test_relative_paths_are_those_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):  # the second finds a worker that was started in the first
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert sandbox.call("os:getcwd", what="x") == str((tmp_path / name).resolve())

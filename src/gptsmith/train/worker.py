"""A thread that executes functions while the main thread goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Executes functions in a thread of its own, in the order in which they are submitted.

    The process may end before a function does, other than with a ThreadPoolExecutor: where a disk
    does not answer, a second Ctrl-C is to end it. Whoever needs a result waits for it by `result`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """End the thread when it has executed what was submitted."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and what it holds


def result(future: Future[T]) -> T:
    """What the function has returned or raised. While the main thread waits, it handles signals:
    it blocks them (`StopSignal`), so that none would wake it from future.result()."""
    while not future.done():
        wait([future], timeout=0.1)
    return future.result()

"""The thread that runs the engines."""

import threading

from gptsmith.serve.metrics import Metrics
from gptsmith.serve.worker import Worker


def test_closing_just_before_the_thread_waits_ends_it() -> None:
    worker = Worker([], 1, 1, Metrics())

    class ClosedMeanwhile(threading.Event):
        def clear(self) -> None:
            worker._closed = True  # what close() does in another thread
            self.set()
            super().clear()

    worker._wake = ClosedMeanwhile()
    worker.start()
    worker.join(10)
    assert not worker.is_alive()

"""Handle SIGTERM and SIGINT as a request to stop, without killing child processes."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNAL_NAMES = tuple(number.name for number in SIGNALS)


class StopSignal:
    """A context manager: SIGTERM and SIGINT only set `received`. A SIGINT after that interrupts,
    as a second Ctrl-C is meant to; a SIGTERM never does: batch systems repeat it before they kill.

    Child processes started within it do not receive them. Ctrl-C goes to every process in the
    terminal's foreground group and a batch system's SIGTERM to every process of a job, while
    torch.compile runs C++ compilers: a killed compiler fails the step, or, if it was probing the
    processor's features, leaves slower kernels that round differently. A process inherits the
    signal mask of the thread that starts it. So the main thread blocks both signals, and a thread
    that does nothing else receives them; Python still runs the handler in the main thread.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._exited = threading.Event()
        self._receiver = threading.Thread(target=self._exited.wait, daemon=True)
        self._receiver.start()  # before the signals are blocked, which it would inherit
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._exited.set()
        self._receiver.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

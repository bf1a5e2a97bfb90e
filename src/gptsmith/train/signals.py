"""The signals that ask a run to stop, of which its child processes must not die."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, SIGTERM and SIGINT set `received` and nothing else; a second one kills.

    Processes started meanwhile never see them. Ctrl-C goes to all processes of the terminal's
    foreground, the SIGTERM of a batch system to all of a job, and torch.compile runs C++ compilers:
    one that dies takes the step with it, or, if it was to try what the processor can do, leaves
    slower kernels with other roundings. A process inherits what the thread that starts it blocks.
    So the main thread blocks both signals, and a thread that does nothing else takes them; Python
    runs the handler in the main thread all the same.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._over = threading.Event()
        self._taker = threading.Thread(target=self._over.wait, daemon=True)
        self._taker.start()  # before the block, which it would inherit too
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._over.set()
        self._taker.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

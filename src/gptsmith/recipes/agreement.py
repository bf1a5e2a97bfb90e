"""What all ranks of a run must decide alike: the time, whether to save, whether to stop."""

from __future__ import annotations

import time

from gptsmith.train import distributed
from gptsmith.train.monitor import Monitor, SilentMonitor
from gptsmith.train.signals import SIGNAL_NAMES, StopSignal


class StopRequested(Exception):
    """A signal asks the run to stop."""


class Agreement:
    """Clock and signals of a run. With several ranks they are exchanged after each step: the clock
    is that of rank 0, and a signal to any rank counts for all of them. A process alone asks its own
    whenever it needs to know.
    """

    def __init__(self, stop: StopSignal, next_save: float) -> None:
        """next_save: time.perf_counter() at which a checkpoint is due."""
        self.stop, self.next_save = stop, next_save
        self._seconds: float | None = None  # of the last exchange
        self._save, self._signal = False, ""

    def exchange(self, monitor: Monitor | SilentMonitor) -> float:
        """After a step, by all ranks; returns the seconds of the run."""
        if distributed.world_size() == 1:
            return monitor.seconds
        first = distributed.rank() == 0
        late = time.perf_counter() > self.next_save
        received = (self.stop.received == name for name in SIGNAL_NAMES)
        sums = distributed.sums(first * monitor.seconds, first * late, *received)
        self._seconds, self._save = sums[0], bool(sums[1])
        names = [name for name, count in zip(SIGNAL_NAMES, sums[2:], strict=True) if count]
        self._signal = names[0] if names else ""
        return self._seconds

    def seconds(self, monitor: Monitor | SilentMonitor) -> float:
        """The seconds of the run, with several ranks at the last exchange."""
        return monitor.seconds if self._seconds is None else self._seconds

    def check_signal(self) -> None:
        """Within a step, which may be long: StopRequested if a process alone has received a signal.
        Several ranks finish the step, because they stop together."""
        if distributed.world_size() == 1 and self.stop.received:
            raise StopRequested

    @property
    def save_is_due(self) -> bool:
        return self._save if self._seconds is not None else time.perf_counter() > self.next_save

    @property
    def signal(self) -> str | None:
        """The name of the signal on which to stop."""
        return self._signal or None if self._seconds is not None else self.stop.received

"""The output of a training run: a progress line, metrics.jsonl, and files derived from it.

metrics.jsonl is the record: one JSON object per line, with the CRC-32 of the rest of the line:
    {"event": "train", "step": 500, "train_loss": 1.93, ..., "seconds": 12.3, "crc32": "9bd2c0a1"}
Events are train, val, tasks, note and sample. They may have any fields; metrics.csv contains those
in COLUMNS and further measurements, as `table` says. metrics.csv, curves.png and samples.txt are
derived from the record and can be rebuilt.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gptsmith.console import Console
from gptsmith.files import naming, read_bytes, sync, write_text
from gptsmith.progress import ProgressLine
from gptsmith.train.trackers import Tracker, open_trackers

METRICS, TABLE, CURVES, SAMPLES = "metrics.jsonl", "metrics.csv", "curves.png", "samples.txt"
LOSS_LABEL = "loss (nats per token)"
COLUMNS = (
    "step",
    "epoch",
    "train_loss",
    "val_loss",
    "learning_rate",
    "tokens",
    "seconds",
    "tokens_per_second",
)
_CHECKED = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}')


class Monitor:
    """Records and shows a training run. A context manager that calls `close` at its end.

    folder: of the run. total_steps: None if unknown. trackers: see trackers.open_trackers.
    resume: step and `seconds` of the checkpoint that the run resumes from; later events are
    dropped. started: time.perf_counter() at which `seconds` begins (default now; a command passes
    command_start()). interval: seconds between progress lines without a terminal. scores: fields
    of tasks events to draw below the loss, each with reference values:
    {"hellaswag_acc_token": {"GPT-2 124M": 0.294}}. curves: measurements to draw below the loss, as
    train_NAME and val_NAME. loss_label: of the axis of the loss. objective: see plots.draw_curves.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int | None,
        config: dict[str, Any],
        trackers: Sequence[str] = ("auto",),
        resume: tuple[int, float] | None = None,
        started: float | None = None,
        console: Console | None = None,
        interval: float = 5.0,
        scores: Mapping[str, Mapping[str, float]] | None = None,
        curves: Sequence[str] = (),
        loss_label: str = LOSS_LABEL,
        objective: str = "loss",
    ) -> None:
        now = time.perf_counter()
        self._scores = scores or {}
        self._curves, self._loss_label, self._objective = curves, loss_label, objective
        self.folder = folder
        self._started = now if started is None else started
        self._earlier_seconds = resume[1] if resume else 0.0
        resumed = resume[0] if resume else None
        self.line = ProgressLine(console or Console(stderr=True), total_steps, interval)
        """Progress of the run and plain lines, for the terminal; not recorded."""
        self.trackers = open_trackers(trackers, folder, config, resumed)
        events = [] if resumed is None else read_events(folder / METRICS, until=resumed)
        # final notes are written again when the run ends again
        self.events = [event for event in events if not event.get("closing")]
        write_text(folder / METRICS, "".join(map(_json, self.events)))
        samples = [_sample(event) for event in self.events if event["event"] == "sample"]
        write_text(folder / SAMPLES, "".join(samples))
        self._file: IO[str] = (folder / METRICS).open("a")
        self._draw_end, self._draw_seconds = now, 0.5  # of the last drawing

    # --- the record

    @property
    def seconds(self) -> float:
        """Since the start of the command, plus the time of the commands that it continues."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def log(self, step: int, event: str = "train", **fields: Any) -> None:
        """Record an event, and show "val", "tasks" and "note" events on the terminal.

        fields: JSON values or one-element tensors; NaN and infinity become null. `seconds` is
        added, and to "val" the peak memory. A note is shown as its `message`, without the step.
        """
        values = {name: _json_value(value) for name, value in fields.items()}
        values.setdefault("seconds", round(self.seconds, 3))
        if event == "val":
            values.setdefault("peak_memory_mb", round(peak_memory_mb(), 1))
        self._write({"event": event, "step": step, **values})
        numbers = {
            f"{event}/{name.removeprefix(event + '_')}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if event in ("train", "val", "tasks"):
            self._track(lambda tracker: tracker.scalars(step, numbers))
        if event in ("val", "tasks"):
            hidden = {*COLUMNS, "peak_memory_mb"} - {"val_loss"}
            shown = [f"{n} {v:.4g}" for n, v in values.items() if v is not None and n not in hidden]
            on = f" (on {values['tokens']:,} tokens)" if values.get("tokens") else ""
            self.line.print(f"step {step:,}: " + ", ".join(shown).replace("_", " ") + on)
        elif event == "note":
            self.line.print(fields.get("message", ""))

    def text(self, step: int, title: str, text: str) -> None:
        """Record a sample of generated text (samples.txt, trackers)."""
        event = {"event": "sample", "step": step, "title": title, "text": text}
        self._write(event)
        samples = self.folder / SAMPLES
        with naming(samples), samples.open("a", errors="replace") as file:
            file.write(_sample(event))
        self._track(lambda tracker: tracker.text(step, title, text))

    def sync(self) -> None:
        """Make the record durable; before each checkpoint, so that it is never newer than that."""
        with naming(self.folder / METRICS):
            os.fsync(self._file.fileno())
        self._track(lambda tracker: tracker.flush())

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """Call each tracker. The run goes on without one that fails, as a server may in days of
        training; a disk that fails is an error of the run."""
        for tracker in [*self.trackers]:
            try:
                call(tracker)
            except OSError:
                raise
            except Exception as error:  # each raises its own
                self.trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                name = type(tracker).__name__
                self.line.print(f"tracker {name} failed, so the run goes on without it: {reason}")

    def _write(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        with naming(self.folder / METRICS):
            self._file.write(_json(event))
            self._file.flush()  # one short write: a killed process leaves complete lines

    # --- the derived files

    def draw(self, force: bool = False) -> None:
        """Write metrics.csv and curves.png, unless that would take more than 2% of the run time."""
        if not force and time.perf_counter() - self._draw_end < 50 * self._draw_seconds:
            return
        from gptsmith.train.plots import draw_curves  # matplotlib: 0.3 s

        begin = time.perf_counter()
        rows = table(self.events)
        text = io.StringIO()
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / TABLE, text.getvalue())
        draw_curves(
            self.folder / CURVES, rows, self.folder.resolve().name, self._scores, self._curves,
            self._loss_label, self._objective,
        )  # fmt: skip
        self._draw_end = time.perf_counter()
        self._draw_seconds = self._draw_end - begin

    # --- the end

    def close(self) -> None:
        """Stop the bar, draw, make everything durable, close the trackers. Idempotent."""
        if self._file.closed:
            return
        self.line.stop()
        try:
            self.draw(force=True)
            self.sync()
            sync(self.folder / SAMPLES)
        finally:
            self._file.close()
            self._track(lambda tracker: tracker.close())

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SilentMonitor:
    """Stands for the Monitor on ranks other than 0: it keeps time, and records and shows nothing.

    earlier_seconds: of the commands that this one continues.
    """

    def __init__(self, earlier_seconds: float = 0.0) -> None:
        self._started = time.perf_counter() - earlier_seconds
        self.line = self

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def log(self, step: int, event: str = "train", **fields: Any) -> None: ...

    def text(self, step: int, title: str, text: str) -> None: ...

    def print(self, text: str) -> None: ...

    def show(self, step: int, value: float, name: str, **fields: Any) -> None: ...

    def draw(self) -> None: ...

    def sync(self) -> None: ...

    def __enter__(self) -> SilentMonitor:
        return self

    def __exit__(self, *exception: object) -> None: ...


def read_events(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl up to step `until`; none if the file is missing.

    An incomplete last line, as left by a kill or a power failure, is ignored. ValueError naming any
    other line that is not an event with its checksum.
    """
    if not path.exists():
        return []
    *lines, torn = read_bytes(path).split(b"\n")
    events, checked = [], False
    for number, line in enumerate(lines, 1):
        checked = checked or _CHECKED.fullmatch(line) is not None  # earlier versions wrote none
        event = _event(line, checked)
        if event is None:
            raise ValueError(
                f"{path}, line {number}: damaged, it is no event with its checksum; restore the "
                "file from a copy, or remove this line"
            )
        events.append(event)
    if event := _event(torn, checked) or (_event(torn[:-1], True) if checked else None):
        events.append(event)  # whole: only the end of the line is damaged
    return [event for event in events if until is None or event["step"] <= until]


def count_events(events: Iterable[Mapping[str, Any]]) -> int:
    """Their number without notes, which depend on how often a run was stopped and resumed."""
    return sum(event["event"] != "note" for event in events)


def _event(line: bytes, checked: bool) -> dict[str, Any] | None:
    """The event of a line; None if it is damaged. checked: it must have a checksum."""
    if checked:
        found = _CHECKED.fullmatch(line)
        if found is None or zlib.crc32(found[1] + b"}") != int(found[2], 16):
            return None
        line = found[1] + b"}"
    try:
        event = json.loads(line)
        kind, step = event["event"], event["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return event if isinstance(kind, str) and isinstance(step, int) else None


def table(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.csv: the train, val and tasks events of a step merged into one row.

    Of a val event only epoch, time and what is named val_... are used: its `tokens` are not
    training tokens. A second one of the same step, at the end of a run, uses more text and is not
    comparable with the others. Fields of tasks events, and those of train events that are named
    train_..., become additional columns.
    """
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("train", "val", "tasks"):
            row = rows.setdefault(event["step"], dict.fromkeys(COLUMNS))
            kind = event["event"]
            names: Iterable[str] = event.keys() - {"event"}
            if kind == "val" and row["val_loss"] is not None:
                continue
            if kind != "tasks":
                known = COLUMNS if kind == "train" else ("epoch", "val_loss", "seconds")
                names = [n for n in event if n in known or n.startswith(f"{kind}_")]
            row["step"] = event["step"]
            row.update({name: event[name] for name in names if event.get(name) is not None})
    return [rows[step] for step in sorted(rows)]


def peak_memory_mb() -> float:
    """Peak memory in MB (10^6 bytes): of the GPU in use, else of the process."""
    import torch  # here, so that reading a record does not import it

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # a run uses one of the visible GPUs, not always the first; the others report 0
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 1e6
    with suppress(OSError):  # Linux, where ru_maxrss begins with the memory of the parent process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def command_start() -> float:
    """time.perf_counter() at which this process started, before the interpreter and imports."""
    now = time.perf_counter()
    try:
        # proc(5): field 22 of stat, in clock ticks since boot; field 2 may contain spaces
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        age = time.process_time()
    return now - max(age, 0.0)


def _json_value(value: Any) -> Any:
    """A JSON value: tensors and NumPy scalars become numbers, NaN and infinity None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(event: Mapping[str, Any]) -> str:
    text = json.dumps(event)  # ASCII: no character in it can end a line early
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def _sample(event: Mapping[str, Any]) -> str:
    return f"--- step {event['step']:,}: {event['title']} ---\n{event['text']}\n\n"

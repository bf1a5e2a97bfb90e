"""What a training run tells: a progress line, metrics.jsonl, and all that is derived from it.

metrics.jsonl is the record, one JSON object a line:
    {"event": "train", "step": 500, "train_loss": 1.93, ..., "seconds": 12.3}
Events are train, val, tasks, note and sample; fields are free, those of the table keep its names.
metrics.csv, curves.png and samples.txt are derived from it and can always be made again.
"""

import csv
import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from torch import Tensor

from gptsmith.files import atomic_path, sync, write_text
from gptsmith.train.progress import ProgressLine
from gptsmith.train.trackers import open_trackers

METRICS, TABLE, CURVES, SAMPLES = "metrics.jsonl", "metrics.csv", "curves.png", "samples.txt"
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


class Monitor:
    """The one voice of a training run. A context manager: leaving it draws, flushes and closes.

    folder: the run's. total_steps: None when unknown. trackers: see trackers.open_trackers.
    resume: step and `seconds` of the checkpoint from which the run goes on; later events are
    dropped. started: time.perf_counter() at which `seconds` begins (default now; a command passes
    command_start()). every: seconds between lines where there is no terminal. drawn: fields of
    tasks events that go below the loss, each with levels to hold it against:
    {"hellaswag_acc_token": {"GPT-2 124M": 0.294}}.
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
        every: float = 5.0,
        drawn: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        now = time.perf_counter()
        self._levels = drawn or {}
        self.folder = folder
        self._began = now if started is None else started
        self._earlier = resume[1] if resume else 0.0
        resumed = resume[0] if resume else None
        self._line = ProgressLine(console or Console(stderr=True), total_steps, every)
        self.trackers = open_trackers(trackers, folder, config, resumed)
        self.events = [] if resumed is None else read_events(folder / METRICS, until=resumed)
        with atomic_path(folder / METRICS) as temporary:
            temporary.write_text("".join(map(_json, self.events)))
        write_text(folder / SAMPLES, "".join(map(_sample, self._of("sample"))))
        self._file: IO[str] = (folder / METRICS).open("a")
        self._drawn, self._drawing = now, 0.5  # end and length of the last drawing, seconds

    # the record

    @property
    def seconds(self) -> float:
        """Since the start of the command, and in the commands that this one resumes."""
        return self._earlier + time.perf_counter() - self._began

    def log(self, step: int, event: str = "train", **fields: Any) -> None:
        """Record an event. Fields are JSON values or one-element tensors; NaN and infinity become
        null. `seconds` is added, and to "val" the peak memory. "val", "tasks" and "note" are also
        shown: a note as its `message` stands, which names the step where that matters."""
        values = {name: _plain(value) for name, value in fields.items()}
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
            for tracker in self.trackers:
                tracker.scalars(step, numbers)
        if event in ("val", "tasks"):
            hidden = {*COLUMNS, "peak_memory_mb"} - {"val_loss"}
            shown = [f"{n} {v:.4g}" for n, v in values.items() if v is not None and n not in hidden]
            self.say(f"step {step:,}: " + ", ".join(shown).replace("_", " "))
        elif event == "note":
            self.say(fields.get("message", ""))

    def text(self, step: int, title: str, text: str) -> None:
        """Record a sample of generated text (samples.txt, trackers)."""
        event = {"event": "sample", "step": step, "title": title, "text": text}
        self._write(event)
        with (self.folder / SAMPLES).open("a", errors="replace") as file:
            file.write(_sample(event))
        for tracker in self.trackers:
            tracker.text(step, title, text)

    def sync(self) -> None:
        """Make the record durable. Before each checkpoint: its step's events must not be lost."""
        os.fsync(self._file.fileno())
        for tracker in self.trackers:
            tracker.flush()

    def _write(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._file.write(_json(event))
        self._file.flush()  # one short write: a killed process leaves whole lines

    def _of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in kinds]

    # the derived files

    def draw(self, force: bool = False) -> None:
        """Write metrics.csv and curves.png; not so often that it would take 2% of the time."""
        if not force and time.perf_counter() - self._drawn < 50 * self._drawing:
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
        draw_curves(self.folder / CURVES, rows, self.folder.resolve().name, self._levels)
        self._drawn = time.perf_counter()
        self._drawing = self._drawn - begin

    # the terminal

    def progress(
        self,
        step: int,
        *,
        loss: float | Tensor,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Show where the run is (see progress.ProgressLine.show). Cheap to call at each step."""
        self._line.show(step, loss=loss, tokens_per_second=tokens_per_second, mfu=mfu)

    def say(self, text: str) -> None:
        """A line of plain text on the terminal, above the progress bar; not recorded."""
        self._line.say(text)

    # the end

    def close(self) -> None:
        """Stop the bar, draw, make everything durable, end the trackers. Twice does no harm."""
        if self._file.closed:
            return
        self._line.stop()
        try:
            self.draw(force=True)
            self.sync()
            sync(self.folder / SAMPLES)
        finally:
            self._file.close()
            for tracker in self.trackers:
                tracker.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_events(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, without those past step `until`.

    Reading ends at the first line that is no event: after a power cut the end of the file may be
    torn, but what was synced before a checkpoint is not. A missing file has no events.
    """
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
            kind, step = event["event"], event["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not isinstance(kind, str) or not isinstance(step, int):
            break
        if until is None or step <= until:
            events.append(event)
    return events


def table(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.csv: one per step at which train, val or tasks was logged, merged.

    Tokens and speed are those of training: an evaluation's own `tokens` are no progress. The fields
    of tasks are further columns.
    """
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("train", "val", "tasks"):
            row = rows.setdefault(event["step"], dict.fromkeys(COLUMNS))
            names: Iterable[str] = ("epoch", "val_loss", "seconds")
            if event["event"] != "val":
                names = COLUMNS if event["event"] == "train" else event.keys() - {"event"}
            row["step"] = event["step"]
            row.update({name: event[name] for name in names if event.get(name) is not None})
    return [rows[step] for step in sorted(rows)]


def peak_memory_mb() -> float:
    """Most memory held at once, in MB (10^6 bytes): of the GPU in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # a run uses one GPU of those it sees, not always the first: the others stand at 0
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def command_start() -> float:
    """time.perf_counter() at which this process began, interpreter and imports included."""
    now = time.perf_counter()
    try:
        # proc(5): field 22 of stat, in clock ticks since boot; field 2 may contain spaces
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        age = time.process_time()
    return now - max(age, 0.0)


def _plain(value: Any) -> Any:
    """A JSON value: tensors and NumPy scalars as Python numbers, NaN and infinity as None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(event: Mapping[str, Any]) -> str:
    return json.dumps(event) + "\n"  # ASCII: no character in it can end a line early


def _sample(event: Mapping[str, Any]) -> str:
    return f"--- step {event['step']:,}: {event['title']} ---\n{event['text']}\n\n"

"""The record of a run and the files derived from it: monitor.py, plots.py."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monitors import quiet, train_on

from gptsmith import progress
from gptsmith.console import Console
from gptsmith.train import monitor
from gptsmith.train.monitor import command_start, peak_memory_mb, read_events


class Clock:
    """The time that progress lines see."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_record_and_table(tmp_path: Path) -> None:
    with quiet(tmp_path) as m:
        m.log(0, "val", val_loss=4.2, perplexity=66.7, tokens=1984)  # evaluated, not trained on
        m.log(10, train_loss=torch.tensor(2.5), learning_rate=np.float32(0.5), tokens=7680)
        m.log(10, "val", val_loss=2.6, tokens=7680, seconds=1.25)
        m.log(20, train_loss=float("nan"), epoch=0.4, tokens_per_second=1234.5)
        m.log(20, "note", message="skipped a batch")
    events = lines(tmp_path)
    assert [(e["event"], e["step"]) for e in events] == [
        ("val", 0), ("train", 10), ("val", 10), ("train", 20), ("note", 20)
    ]  # fmt: skip
    assert events[1]["train_loss"] == 2.5
    assert events[3]["train_loss"] is None, "NaN is no JSON"
    assert events[0]["peak_memory_mb"] > 10
    assert all("seconds" in event for event in events)
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines()[0] == (
        "step,epoch,train_loss,val_loss,learning_rate,tokens,seconds,tokens_per_second"
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["step"] for row in rows] == ["0", "10", "20"]
    assert rows[1] == {
        "step": "10", "epoch": "", "train_loss": "2.5", "val_loss": "2.6", "learning_rate": "0.5",
        "tokens": "7680", "seconds": "1.25", "tokens_per_second": "",
    }  # fmt: skip
    assert (rows[0]["tokens"], rows[0]["val_loss"]) == ("", "4.2")
    assert rows[2]["train_loss"] == ""


def test_resume_drops_events_after_the_checkpoint(tmp_path: Path) -> None:
    with quiet(tmp_path) as m:
        train_on(m, range(61))
        for step in (20, 40, 60):
            m.text(step, "once", f"--- step 50: forged ---\ntext of {step}, naïve \u2028 漢")
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # a power cut

    with quiet(tmp_path, resume=(40, 123.0)) as m:
        assert lines(tmp_path) == [event for event in whole if event["step"] <= 40]
        samples = (tmp_path / "samples.txt").read_text()
        assert "text of 40" in samples
        assert "text of 60" not in samples
        assert 123.0 <= m.seconds < 124.0
        train_on(m, range(41, 61))
        m.text(60, "once", "--- step 50: forged ---\ntext of 60, naïve \u2028 漢")

    def shown(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        hidden = ("seconds", "peak_memory_mb", "crc32")
        kept = [{k: v for k, v in event.items() if k not in hidden} for event in events]
        return sorted(kept, key=lambda event: (event["step"], event["event"]))

    assert shown(lines(tmp_path)) == shown(whole)
    assert lines(tmp_path)[-1]["event"] == "sample"
    after = [event["seconds"] for event in lines(tmp_path) if "seconds" in event]
    assert after[-1] >= 123.0
    samples = (tmp_path / "samples.txt").read_text()
    assert samples.index("text of 20") < samples.index("text of 40") < samples.index("text of 60")


def test_a_new_run_starts_with_an_empty_record(tmp_path: Path) -> None:
    for _ in range(2):  # the first was killed before its first checkpoint, say
        with quiet(tmp_path) as m:
            train_on(m, range(3))
    assert len(lines(tmp_path)) == 4


def test_only_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_events(path) == []
    good = b'{"event": "train", "step": 1}\n'  # as earlier versions wrote it
    for torn in (b"\0\0\0", b'{"event"', b'{"event": "train", "step": "2"}', b"\xff"):
        path.write_bytes(good + torn)
        assert read_events(path) == [{"event": "train", "step": 1}]
    for line in (b"[1]\n", b"\n", b'{"event"\n', b'{"event": "train", "step": "2"}\n', b"\xff\n"):
        path.write_bytes(good + line)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: damaged"):
            read_events(path)


def test_any_changed_bit_of_the_record_is_named_or_changes_nothing(tmp_path: Path) -> None:
    with quiet(tmp_path) as m:
        train_on(m, range(25))
        m.text(24, "once", "naïve text")
    path, whole = tmp_path / "metrics.jsonl", read_events(tmp_path / "metrics.jsonl")
    good, rng = path.read_bytes(), np.random.default_rng(0)
    places = rng.integers(len(good), size=400).tolist()
    for at in [*places, len(good) - 1]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1 :])
        damaged, found = "", []
        try:
            found = read_events(path)
        except ValueError as error:
            damaged = str(error)
        if damaged:
            assert f"line {good[:at].count(10) + 1}: damaged" in damaged
        else:  # the end of the last line, or the checksum's name in the first
            names = [event.keys() for event in whole]
            kept = [{k: e[k] for k in e if k in n} for e, n in zip(found, names, strict=True)]
            assert kept == whole


def test_resume_with_a_damaged_record_drops_nothing(tmp_path: Path) -> None:
    with quiet(tmp_path) as m:
        train_on(m, range(61))
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'"step": 20, "train', b'"step": 21, "train', 1)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line 22: damaged.*, or remove this line"):
        quiet(tmp_path, resume=(40, 1.0))
    assert path.read_bytes() == damaged
    path.write_bytes(b"".join(line for i, line in enumerate(damaged.splitlines(True)) if i != 21))
    with quiet(tmp_path, resume=(40, 1.0)) as m:
        assert [e["step"] for e in m.events if e["event"] == "train"] == [
            step for step in range(41) if step != 20
        ]


def test_closing_notes_are_not_repeated_by_a_resume(tmp_path: Path) -> None:
    for resume in (None, (2, 1.0), (2, 2.0)):
        with quiet(tmp_path, resume=resume) as m:
            if resume is None:
                train_on(m, range(3))
                m.log(2, "note", message="step 1 skipped")
            m.log(2, "note", message="1 of 2 steps were skipped", closing=True)
    notes = [e["message"] for e in read_events(tmp_path / "metrics.jsonl") if e["event"] == "note"]
    assert notes == ["step 1 skipped", "1 of 2 steps were skipped"]


LOGGER = """
import io, sys
from pathlib import Path
from gptsmith.console import Console
from gptsmith.train.monitor import Monitor
console = Console(file=io.StringIO())
m = Monitor(Path(sys.argv[1]), total_steps=None, config={}, trackers=(), console=console)
print("ready", flush=True)
step = 0
while True:
    step += 1
    m.log(step, train_loss=1 / step, padding="x" * (step % 3000))
"""


def test_kill_while_logging_leaves_complete_lines(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while (tmp_path / "metrics.jsonl").stat().st_size < 50_000:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    steps = [event["step"] for event in lines(tmp_path)]
    assert len(steps) > 10
    assert steps == list(range(1, len(steps) + 1))


def test_progress_lines_without_a_terminal(tmp_path: Path, clock: Clock) -> None:
    output = io.StringIO()
    m = quiet(tmp_path, total_steps=2000, console=Console(file=output, width=40), interval=5)
    with m:
        for message in ("model: 12 parameters", "precision fp32: as configured"):
            m.log(0, "note", message=message)
        m.line.show(1, 4.0)
        clock.now += 6
        m.line.show(101, torch.tensor(2.5), tokens_per_second=103456.7, mfu=0.5421)
        for step in range(102, 110):
            m.line.show(step, 2.4)
        m.log(500, "val", val_loss=1.83, perplexity=6.2345, tokens=99, top1_accuracy=0.5)
        m.log(510, "note", message="step 510 skipped: loss [bold] is high")
        m.line.show(2000, 1.5)
    shown = output.getvalue().splitlines()
    assert shown[:2] == ["model: 12 parameters", "precision fp32: as configured"]
    assert shown[2] == "step 1/2,000 · loss 4.0000", "shown before there is a speed"
    assert shown[3] == (
        "step 101/2,000 · loss 2.5000 · 103,457 tokens/s · MFU 54.2% · 0:01:54 left"
    )
    assert shown[4] == "step 500: val loss 1.83, perplexity 6.234, top1 accuracy 0.5 (on 99 tokens)"
    assert shown[5] == "step 510 skipped: loss [bold] is high"
    assert shown[6] == "step 2,000/2,000 · loss 1.5000"
    assert len(shown) == 7


@pytest.mark.parametrize("total", [2000, None])
def test_progress_bar_on_a_terminal(tmp_path: Path, clock: Clock, total: int | None) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with quiet(tmp_path, total_steps=total, console=console) as m:
        m.line.show(1, 4.0)
        assert "loss 4.0000" in output.getvalue(), "the bar is there from the first step"
        clock.now += 0.26
        m.line.show(1501, 1.2345, tokens_per_second=103456, mfu=0.54)
        m.line.print("a line above")
        clock.now += 0.26
        m.line.show(1600, 1.2, tokens_per_second=103456, mfu=0.54)
    shown = output.getvalue()
    assert ("step 1,501/2,000" if total else "step 1,501") in shown
    assert "loss 1.2345 · 103,456 tokens/s · MFU 54.0%" in shown
    assert "a line above" in shown
    assert "\x1b[?25h" in shown, "the cursor is restored"


def test_loss_is_not_read_between_progress_lines(tmp_path: Path, clock: Clock) -> None:
    class Unread(torch.Tensor):
        def __float__(self) -> float:
            raise AssertionError("read from the device although nothing is shown")

    loss = torch.ones(()).as_subclass(Unread)
    with quiet(tmp_path) as m:
        m.line.show(1, 4.0)
        for step in range(2, 100):
            clock.now += 0.01
            m.line.show(step, loss)


def test_curves(tmp_path: Path) -> None:
    from matplotlib.image import imread

    with quiet(tmp_path) as m:
        train_on(m, range(101))
        m.draw()
        assert not (tmp_path / "curves.png").exists(), "drawing must not slow a young run"
    picture = imread(tmp_path / "curves.png")
    assert picture.shape == (810, 1200, 4)
    colours = {tuple(pixel) for pixel in (picture[:, :, :3] * 255).astype(int).reshape(-1, 3)}
    assert {(0x2F, 0x6D, 0xB3), (0xD9, 0x54, 0x1E), (0x3A, 0x8A, 0x5F)} <= colours
    with quiet(tmp_path / "short") as m:
        m.log(0, "val", val_loss=None)  # nothing to draw is no error
    with quiet(tmp_path / "flat") as m:
        m.log(0, train_loss=2.0, learning_rate=0.0, tokens=0)
        m.log(1, train_loss=2.0, learning_rate=0.0, tokens=0)
    assert (tmp_path / "flat" / "curves.png").stat().st_size > 5000


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    program = (
        "import io, sys\nfrom pathlib import Path\nfrom gptsmith.console import Console\n"
        "from gptsmith.train.monitor import Monitor\n"
        "assert not {'matplotlib', 'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)\n"
        "m = Monitor(Path(sys.argv[1]), total_steps=1, config={}, trackers=(),"
        " console=Console(file=io.StringIO()))\n"
        "m.log(1, train_loss=1.0); m.close(); m.close()\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_seconds_count_from_the_start_of_the_command(tmp_path: Path) -> None:
    program = (
        "import time; time.sleep(0.4)\nfrom gptsmith.train.monitor import command_start\n"
        "print(time.perf_counter() - command_start())"
    )
    begin = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert 0.4 < float(out.stdout) < time.perf_counter() - begin + 0.05
    began = time.perf_counter() - 10
    with quiet(tmp_path, started=began, resume=(0, 100.0)) as m:
        assert 110 <= m.seconds <= time.perf_counter() - began + 100
    assert command_start() < time.perf_counter()


def test_peak_memory_rises(tmp_path: Path) -> None:
    before = peak_memory_mb()
    block = torch.ones(int(before * 1e6 / 4) + 50_000_000)
    assert peak_memory_mb() > before + 50
    del block


def test_peak_memory_of_the_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [0, 3_000_000, 0]  # a run on cuda:1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: held[device])
    assert peak_memory_mb() == 3.0


def test_the_final_evaluation_on_more_text_is_not_in_the_table() -> None:
    rows = monitor.table(
        [
            {"event": "train", "step": 10, "train_loss": 2.0},
            {"event": "val", "step": 10, "val_loss": 2.5, "tokens": 1000},
            {"event": "val", "step": 10, "val_loss": 2.7, "tokens": 10000},
        ]
    )
    assert [(row["step"], row["train_loss"], row["val_loss"]) for row in rows] == [(10, 2.0, 2.5)]


def test_notes_and_samples_are_not_in_the_table() -> None:
    rows = monitor.table([{"event": "sample", "step": 1}, {"event": "note", "step": 2}])
    assert rows == []


def test_measurements_of_training_and_validation_are_columns() -> None:
    (row,) = monitor.table(
        [
            {
                "event": "train",
                "step": 1,
                "train_loss": 2.0,
                "train_margin": 0.25,
                "grad_norm": 1.0,
            },
            {"event": "val", "step": 1, "val_loss": 1.0, "val_margin": 0.5, "pairs": 9},
        ]
    )
    assert {name: value for name, value in row.items() if value is not None} == {
        "step": 1, "train_loss": 2.0, "train_margin": 0.25, "val_loss": 1.0, "val_margin": 0.5
    }  # fmt: skip

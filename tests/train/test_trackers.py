"""Experiment trackers, each in the form that its own tools read."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monitors import quiet, train_on

from gptsmith.console import Console
from gptsmith.train import trackers
from gptsmith.train.monitor import METRICS, read_events


def test_unknown_and_missing_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"unknown tracker 'tensorbord': choose from auto, none, tensorboard"
    ):
        quiet(tmp_path, trackers=("tensorbord",))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'trackio is not installed: pip install "gptsmith\[track'):
        quiet(tmp_path, trackers=("trackio",))
    with quiet(tmp_path, trackers=("auto", "none")) as m:
        assert m.trackers == []


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard.*")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"model": {"n_layer": 4}, "data": "shakespeare"}
    with quiet(tmp_path, trackers=("auto",), config=config) as m:
        train_on(m, range(61))
        m.text(20, "To be", "or not")
    with quiet(tmp_path, trackers=("tensorboard",), resume=(40, 1.0)) as m:
        m.log(41, train_loss=9.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/learning_rate", "val/loss", "val/perplexity"} <= set(
        tags["scalars"]
    )
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == list(range(42)), "a resumed run purges later steps"
    assert losses[41] == (41, 9.0)
    assert {"config/text_summary", "To be/text_summary"} <= set(tags["tensors"])
    (text,) = events.Tensors("To be/text_summary")
    assert text.tensor_proto.string_val[0] == b"or not"
    (text,) = events.Tensors("config/text_summary")
    assert b"| model.n_layer | `4` |" in text.tensor_proto.string_val[0]


TRACKED = """
import io, sys
from pathlib import Path
from gptsmith.console import Console
from gptsmith.train.monitor import Monitor
name, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir()
for resume in (None, (10, 5.0)):
    with Monitor(folder, total_steps=20, config={"model": {"n_layer": 4}, "seed": 1}, resume=resume,
                 trackers=(name,), console=Console(file=io.StringIO())) as m:
        first = 0 if resume is None else 10
        for step in range(first + 1, first + 11):
            m.log(step, train_loss=1 / step, learning_rate=0.1)
        m.log(first + 10, "val", val_loss=0.5 / (first + 10), perplexity=float("inf"))
        m.text(first + 10, "sample", "To be, *or* not")
"""


def tracked(name: str, folder: Path, **environment: str) -> dict[str, str]:
    """Train with a tracker, in two sessions, in a process of its own; the ids it kept."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f'{name} is not installed: pip install "gptsmith[track]"')
    done = subprocess.run(
        [sys.executable, "-c", TRACKED, name, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HOME": str(folder.parent), **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "trackers.json").read_text())


def test_wandb_offline(tmp_path: Path) -> None:
    ids = tracked("wandb", tmp_path / "run", WANDB_MODE="offline")
    records = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in records} == {f"run-{ids['wandb']}.wandb"}
    content = b"".join(path.read_bytes() for path in records)
    for key in (b"train/loss", b"val/loss", b"n_layer"):
        assert key in content


def test_mlflow_local(tmp_path: Path) -> None:
    import sqlite3

    ids = tracked("mlflow", tmp_path / "run", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    database = sqlite3.connect(tmp_path / "run" / "mlflow.db")
    ((run, status),) = database.execute("select run_uuid, status from runs").fetchall()
    assert (run, status) == (ids["mlflow"], "FINISHED")
    steps = database.execute("select step from metrics where key = 'train/loss' order by step")
    assert [step for (step,) in steps] == list(range(1, 21))
    parameters = dict(database.execute("select key, value from params").fetchall())
    assert parameters == {"model.n_layer": "4", "seed": "1"}
    database.close()
    samples = list((tmp_path / "run" / "mlflow").rglob("step-*.txt"))
    assert sorted(path.name for path in samples) == ["step-000010.txt", "step-000020.txt"]


def test_trackio_local(tmp_path: Path) -> None:
    import sqlite3

    store = tmp_path / "store"
    ids = tracked("trackio", tmp_path / "run", TRACKIO_DIR=str(store), HF_HUB_OFFLINE="1")
    database = sqlite3.connect(store / "gptsmith.db")
    rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    database.close()
    assert {name for name, _, _ in rows} == {ids["trackio"]}
    losses = {step: json.loads(values).get("train/loss") for name, step, values in rows}
    assert set(losses) == set(range(1, 21))


def test_tracker_that_fails_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: object) -> trackers.Tracker:
        raise RuntimeError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", reject)
    with pytest.raises(
        ValueError, match=r"wandb failed to start: No API.*\(WANDB_MODE=offline"
    ) as e:
        quiet(tmp_path, trackers=("wandb",))
    assert "\n" not in str(e.value)


def test_a_run_goes_on_without_a_tracker_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable(trackers.TensorBoard):
        def scalars(self, step: int, values: object) -> None:
            raise RuntimeError("HTTP 503:\nthe server is gone")

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Unreachable)
    said = io.StringIO()
    names = ("mlflow", "tensorboard")
    with quiet(tmp_path, trackers=names, console=Console(file=said)) as m:
        train_on(m, range(3))
        assert [type(tracker).__name__ for tracker in m.trackers] == ["TensorBoard"]
    assert said.getvalue().count("so the run goes on without it: HTTP 503: the server is gone") == 1
    assert [e["step"] for e in read_events(tmp_path / METRICS) if e["event"] == "train"] == [
        0,
        1,
        2,
    ]

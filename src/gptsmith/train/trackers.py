"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, trackio.

Each is imported only when it is used. metrics.jsonl remains the record. A resumed run continues the
same W&B, MLflow or trackio run: trackers.json holds their ids.
"""

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from gptsmith.arguments import check_several
from gptsmith.config import flatten
from gptsmith.files import naming, read_json, write_json

RUN_IDS = "trackers.json"


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, title: str, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in FOLDER/tensorboard; `tensorboard --logdir RUN` shows them."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        self.hook, threading.excepthook = threading.excepthook, self._report
        # purge_step: readers drop what a killed process logged after the checkpoint.
        with naming(self.folder):
            self.writer = SummaryWriter(
                self.folder, purge_step=0 if resumed is None else resumed + 1
            )
        if resumed is None:
            rows = [f"| {name} | `{value}` |" for name, value in flatten(config).items()]
            self.text(0, "config", "\n".join(["| field | value |", "|---|---|", *rows]))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with naming(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def text(self, step: int, title: str, text: str) -> None:
        with naming(self.folder):
            self.writer.add_text(title, text, step)

    def flush(self) -> None:
        with naming(self.folder):
            self.writer.flush()

    def close(self) -> None:
        threading.excepthook = self.hook
        with naming(self.folder):
            self.writer.close()

    def _report(self, error: threading.ExceptHookArgs) -> None:
        """Without errors of the writing thread, which the next call raises again."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self.hook(error)


class Wandb:
    """A run in Weights & Biases, or in trackio, which has the same interface.

    W&B: with WANDB_MODE=offline, the run is stored in FOLDER/wandb for `wandb sync`.
    trackio: the run is stored locally in TRACKIO_DIR; `trackio show --project gptsmith`.
    """

    def __init__(
        self, module: str, folder: Path, config: dict[str, Any], resumed: int | None
    ) -> None:
        self.module = import_module(module)
        self.is_wandb = module == "wandb"
        options: dict[str, Any]
        if self.is_wandb:
            run_id = _run_id(folder, module, resumed, lambda: uuid4().hex[:8])
            settings = self.module.Settings(console="off", silent=True)
            options = dict(id=run_id, name=folder.name, dir=folder, settings=settings)
        else:  # trackio identifies a run by its name
            run_id = _run_id(folder, module, resumed, lambda: f"{folder.name}-{uuid4().hex[:6]}")
            options = dict(name=run_id)
        project = os.environ.get("WANDB_PROJECT", "gptsmith")
        self.run = self.module.init(
            project=project, config=flatten(config), resume="allow", **options
        )
        if self.is_wandb:
            # Our own step is the axis: W&B's counter does not go back after a resume.
            self.run.define_metric("step", hidden=True)
            self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if self.is_wandb:
            self.run.log({"step": step, **values})
        else:
            self.run.log(dict(values), step=step)

    def text(self, step: int, title: str, text: str) -> None:
        table = self.module.Table(columns=["step", "text"], data=[[step, text]])
        self.scalars(step, {title: table})

    def flush(self) -> None:
        pass  # both write from a process or thread of their own

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run at MLFLOW_TRACKING_URI, by default in FOLDER/mlflow.db (SQLite)."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: int | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.metric = Metric
        local = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)

        def create() -> str:
            if experiment := self.client.get_experiment_by_name("gptsmith"):
                experiment_id = experiment.experiment_id
            else:
                artifacts = (folder / "mlflow").resolve().as_uri()
                experiment_id = self.client.create_experiment("gptsmith", artifacts)
            run = str(self.client.create_run(experiment_id, run_name=folder.name).info.run_id)
            for name, value in flatten(config).items():
                self.client.log_param(run, name, value)
            return run

        self.run = _run_id(folder, "mlflow", resumed, create)
        self.client.update_run(self.run, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run, metrics)

    def text(self, step: int, title: str, text: str) -> None:
        self.client.log_text(self.run, text, f"{title}/step-{step:06d}.txt")

    def flush(self) -> None:
        pass  # every batch is a committed transaction

    def close(self) -> None:
        self.client.set_terminated(self.run)


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Wandb, "wandb"),
    "mlflow": MLflow,
    "trackio": partial(Wandb, "trackio"),
}


def open_trackers(
    names: Sequence[str], folder: Path, config: dict[str, Any], resumed: int | None
) -> list[Tracker]:
    """Start the named trackers: "auto" is TensorBoard if it is installed, "none" is none.

    resumed: the step that the run resumes from, None for a new run. Raises ValueError for a tracker
    that is unknown, not installed, or fails to start.
    """
    check_several(names, "trackers")
    auto = "none" if importlib.util.find_spec("tensorboard") is None else "tensorboard"
    chosen = dict.fromkeys(auto if name == "auto" else name for name in names)
    chosen.pop("none", None)
    for name in chosen:
        if name not in TRACKERS:
            raise ValueError(
                f"unknown tracker {name!r}: choose from auto, none, {', '.join(TRACKERS)}"
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'tracker {name} is not installed: pip install "gptsmith[track]"')
    return [_start(name, folder, config, resumed) for name in chosen]


def _start(name: str, folder: Path, config: dict[str, Any], resumed: int | None) -> Tracker:
    try:
        return TRACKERS[name](folder, config, resumed)
    except OSError:
        raise
    except Exception as error:  # each raises its own errors: no login, unreachable server, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = " (WANDB_MODE=offline needs no account)" if name == "wandb" else ""
        raise ValueError(f"tracker {name} failed to start: {reason}{hint}") from error


def _run_id(folder: Path, name: str, resumed: int | None, create: Callable[[], str]) -> str:
    """The tracker's id of this run: the recorded one on resume, else a new one from `create`."""
    path = folder / RUN_IDS
    ids: dict[str, str] = read_json(path) if path.exists() else {}
    if resumed is None or name not in ids:
        ids[name] = create()
        write_json(path, ids)
    return ids[name]

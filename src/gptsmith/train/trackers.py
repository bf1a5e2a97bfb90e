"""Where metrics go besides the run folder: TensorBoard, Weights & Biases, MLflow, trackio.

Each is imported only when it is used. None of them is the record: metrics.jsonl is, and a run that
is resumed continues the same W&B, MLflow or trackio run, whose ids stand in trackers.json.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from gptsmith.files import read_json, write_json

IDS = "trackers.json"


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, title: str, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"model": {"n_layer": 4}} becomes {"model.n_layer": 4}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class TensorBoard:
    """Event files in FOLDER/tensorboard: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: readers drop what a killed process logged past the checkpoint.
        self.writer = SummaryWriter(
            folder / "tensorboard", purge_step=0 if resumed is None else resumed + 1
        )
        if resumed is None:
            rows = [f"| {name} | `{value}` |" for name, value in flatten(config).items()]
            self.text(0, "config", "\n".join(["| field | value |", "|---|---|", *rows]))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, title: str, text: str) -> None:
        self.writer.add_text(title, text, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A W&B run, offline under WANDB_MODE=offline (then FOLDER/wandb, for `wandb sync`)."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: int | None) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gptsmith"),
            name=folder.name,
            dir=folder,
            config=config,
            id=_identity(folder, "wandb", resumed, lambda: uuid4().hex[:8]),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Our own step as the axis: W&B's counter refuses to go back after a resume.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def text(self, step: int, title: str, text: str) -> None:
        table = self.wandb.Table(columns=["step", "text"], data=[[step, text]])
        self.run.log({"step": step, title: table})

    def flush(self) -> None:
        pass  # W&B writes from a process of its own

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run in MLFLOW_TRACKING_URI, or else in FOLDER/mlflow.db (SQLite)."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: int | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.metric = Metric
        local = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)

        def create() -> str:
            found = self.client.get_experiment_by_name("gptsmith")
            experiment = (
                found.experiment_id
                if found
                else self.client.create_experiment(
                    "gptsmith", artifact_location=(folder / "mlflow").resolve().as_uri()
                )
            )
            run = str(self.client.create_run(experiment, run_name=folder.name).info.run_id)
            for name, value in flatten(config).items():
                self.client.log_param(run, name, value)
            return run

        self.run = _identity(folder, "mlflow", resumed, create)
        self.client.update_run(self.run, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from time import time

        now = int(time() * 1000)
        metrics = [self.metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run, metrics)

    def text(self, step: int, title: str, text: str) -> None:
        self.client.log_text(self.run, text, f"{title}/step-{step:06d}.txt")

    def flush(self) -> None:
        pass  # every batch is a committed transaction

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Trackio:
    """A trackio run in its own store (TRACKIO_DIR): `trackio show --project gptsmith`."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: int | None) -> None:
        import trackio

        name = _identity(folder, "trackio", resumed, lambda: f"{folder.name}-{uuid4().hex[:6]}")
        self.trackio = trackio
        self.run = trackio.init(
            project="gptsmith", name=name, config=flatten(config), resume="allow"
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, step: int, title: str, text: str) -> None:
        self.run.log({title: self.trackio.Markdown(text)}, step=step)

    def flush(self) -> None:
        pass  # a thread of trackio's writes within half a second

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def open_trackers(
    names: Sequence[str], folder: Path, config: dict[str, Any], resumed: int | None
) -> list[Tracker]:
    """The trackers named; "auto" is TensorBoard where it is installed, "none" is none.

    `resumed` is the step from which a run goes on, None for a new one. Raises ValueError for an
    unknown name, one that is not installed, or one that does not start.
    """
    chosen: list[str] = []
    for name in names:
        if name == "none":
            continue
        if name == "auto":
            if importlib.util.find_spec("tensorboard") is None:
                continue
            name = "tensorboard"
        if name not in TRACKERS:
            raise ValueError(f"no tracker {name!r}: choose from auto, none, {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'tracker {name} is not installed: pip install "gptsmith[track]"')
        if name not in chosen:
            chosen.append(name)
    return [_start(name, folder, config, resumed) for name in chosen]


def _start(name: str, folder: Path, config: dict[str, Any], resumed: int | None) -> Tracker:
    try:
        return TRACKERS[name](folder, config, resumed)
    except OSError:
        raise
    except Exception as error:  # each has errors of its own: no login, unreachable server, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = " (WANDB_MODE=offline needs no account)" if name == "wandb" else ""
        raise ValueError(f"tracker {name} does not start: {reason}{hint}") from error


def _identity(folder: Path, name: str, resumed: int | None, create: Callable[[], str]) -> str:
    """The tracker's id of this run: that of before when the run is resumed, else a new one."""
    path = folder / IDS
    ids: dict[str, str] = read_json(path) if path.exists() else {}
    if resumed is None or name not in ids:
        ids[name] = create()
        write_json(path, ids)
    return ids[name]

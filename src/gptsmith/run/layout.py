"""Names in a run folder, what stands at a path instead of one, and who may train there."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gptsmith import files
from gptsmith.config import rename_keys
from gptsmith.interop.peft import WEIGHTS as ADAPTER_WEIGHTS
from gptsmith.model.config import ModelConfig
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor

CONFIG, ARCHITECTURE, MASK, TUNING = "config.yaml", "model.json", "mask.py", "tuning.json"
WEIGHTS, BASE, ADAPTER = "model.safetensors", "base.safetensors", "adapter"
TOKENIZER, TEMPLATE, CORPUS, REPORT = (
    "tokenizer.json", "chat_template.jinja", "corpus.json", "report.md",
)  # fmt: skip
CHECKPOINTS, LOCK = "checkpoints", ".lock"


def is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / ARCHITECTURE).is_file()


def not_a_run(path: Path) -> OSError | ValueError:
    """What stands at `path` instead of a run, and the remedy."""
    if not path.exists():
        return FileNotFoundError(f"there is no run folder {path}: gptsmith pretrain makes one")
    if not path.is_dir():
        return ValueError(f"{path} is a file: give the run folder that holds it")
    if (path / "manifest.json").exists() and (path / "state.json").exists():
        return ValueError(
            f"{path} is a checkpoint: give its run folder {path.parent.parent} and --checkpoint"
        )
    if (path / "manifest.json").exists():
        return ValueError(
            f"{path} is a prepared corpus, not a run: gptsmith pretrain --data {path} trains on it"
        )
    if (path / "config.json").exists():
        return ValueError(
            f"{path} is a Hugging Face model, not a run: gptsmith import {path} --out RUN makes one"
        )
    if runs := sorted(child.name for child in path.iterdir() if is_run(child)):
        return ValueError(f"{path} is no run, but holds some: {', '.join(runs[:10])}")
    missing = [name for name in (CONFIG, ARCHITECTURE) if not (path / name).is_file()]
    return ValueError(f"{path} is no run folder: it has no {' and no '.join(missing)}")


def refuse_occupied(path: Path) -> None:
    """A new run may go into a new or empty folder, or one that was stopped before its first
    checkpoint."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder as --out")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to what is not there: choose another --out")
    if not path.exists() or not any(path.iterdir()) or _is_untrained(path):
        return
    if is_run(path):
        raise FileExistsError(f"{path} holds a run: --resume to go on with it, or another --out")
    raise FileExistsError(f"{path} is not empty and holds no run: choose another --out")


def refuse_unresumable(path: Path) -> None:
    if not is_run(path):
        raise ValueError(f"nothing to resume: {not_a_run(path)}")
    if _is_untrained(path):
        raise ValueError(
            f"nothing to resume: {path} was stopped before its first checkpoint;"
            " leave --resume away to start it again"
        )
    if not checkpoints.steps(path / CHECKPOINTS):
        raise ValueError(
            f"nothing to resume: {path} has no checkpoints; what it ended with is trained further "
            f"by gptsmith finetune KIND --from {path}"
        )


def _is_untrained(path: Path) -> bool:
    """Ours (it has the lock file), but without anything that would be lost."""
    ends = (path / WEIGHTS, path / ADAPTER / ADAPTER_WEIGHTS)
    trained = any(map(Path.exists, ends)) or bool(checkpoints.steps(path / CHECKPOINTS))
    events = monitor.read_events(path / monitor.METRICS)
    return (path / LOCK).exists() and not trained and not any(e["step"] for e in events)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(files.read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is unreadable: {' '.join(str(error).split())}") from None
    return files.mapping(content, path)


def yaml_text(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def read_architecture(path: Path) -> ModelConfig:
    content = rename_keys(files.mapping(files.read_json(path), path), "model")
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {field}: {first['msg']}") from None

"""The layout of a run folder: file names, its configuration, and errors for other paths."""

import re
import shlex
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from gptsmith import files
from gptsmith.config import MAX_YAML_BYTES, BoundedLoader, rename_keys
from gptsmith.model.config import ModelConfig
from gptsmith.recognize import is_run as is_run
from gptsmith.recognize import wrong_kind

CONFIG, ARCHITECTURE, MASK, TUNING = "config.yaml", "model.json", "mask.py", "tuning.json"
WEIGHTS, BASE, ADAPTER = "model.safetensors", "base.safetensors", "adapter"
REFERENCE = "reference.safetensors"  # what the model before training said, or its weights
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # in ADAPTER, as peft names it
TOKENIZER, TEMPLATE, CORPUS, REPORT = (
    "tokenizer.json", "chat_template.jinja", "corpus.json", "report.md",
)  # fmt: skip
ROLES = "special_tokens.json"  # of the tokenizer; only where the model's files declare them
CHECKPOINTS, LOCK = "checkpoints", ".lock"
MASK_CODE = re.compile(r"(.+\.py):(\w+)")  # a mask that is Python code: file and function

CheckpointName = Literal["last", "best"] | int
"""Weights of a run: of the last step, of the best validation loss, or of a step."""


def not_a_run_error(path: Path) -> OSError | ValueError:
    """The error for a path that is not a run: what it is instead, and the remedy."""
    if not path.exists():
        return FileNotFoundError(f"there is no run folder {path}: gptsmith pretrain makes one")
    missing = [name for name in (CONFIG, ARCHITECTURE) if not (path / name).is_file()]
    if path.is_dir() and len(missing) == 1:
        return ValueError(f"{path} is not a run folder: it has no {missing[0]}")
    return wrong_kind(path, "a run")


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml or a recipe, with current key names; ValueError if it is unreadable."""
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"{path} has more than {MAX_YAML_BYTES:,} bytes: not a configuration")
    try:
        content = yaml.load(files.read_text(path), BoundedLoader)
    except OSError:
        raise
    except Exception as error:  # YAMLError, or whatever yaml raises for a value that it cannot make
        raise ValueError(f"{path} is unreadable: {' '.join(str(error).split())}") from None
    return rename_keys(files.check_mapping(content, path))


def yaml_text(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def stage_of(config: dict[str, Any]) -> str:
    """The stage that made a run: pretrain, text, chat, instruct, classify, preference or import.

    config: its config.yaml. Runs made before `stage` was recorded are recognised by a field that
    only their recipe had.
    """
    if "stage" in config:
        return str(config["stage"])
    fields = {
        "import": "import",
        "pad_vocab_multiple": "pretrain",
        "document_mask": "text",
        "mask_prompt": "instruct",
        "texts_per_step": "classify",
    }
    return next((stage for field, stage in fields.items() if field in config), "chat")


def command_of(stage: str) -> str:
    """The command that makes a run of this stage: `pretrain`, `finetune chat`."""
    return stage if stage in ("pretrain", "import") else f"finetune {stage}"


def resume_command(path: Path, stage: str) -> str:
    """The command line that resumes a run."""
    return f"gptsmith {command_of(stage)} --out {shlex.quote(str(path))} --resume"


def read_architecture(path: Path) -> ModelConfig:
    """model.json; ValueError naming an invalid field."""
    content = rename_keys(files.read_mapping(path), "model")
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {field}: {first['msg']}") from None

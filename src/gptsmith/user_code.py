"""Python files of users: masks and rewards that are code. They run with permission only."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def run_file(path: Path, what: str, *, trust_code: bool) -> ModuleType:
    """The module that a file defines. what: begins the errors, `mask 'mine.py:f'`.

    ValueError without trust_code and for whatever the file raises; FileNotFoundError.
    """
    if not trust_code:
        raise ValueError(
            f"{what} runs the Python code in {path}: review it, then pass --trust-code"
            " (trust_code=True)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path} does not exist (no such file)")
    spec = importlib.util.spec_from_file_location(f"gptsmith_user_{path.stem}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    try:  # not by the loader, which would leave a __pycache__ beside the file, in a run for example
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {path} raises {error!r}") from error
    return module

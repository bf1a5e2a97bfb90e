"""`gptsmith doctor`: what this machine can do, and the remedy for what it lacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gptsmith import terminal
from gptsmith.config import Section, load_config


class DoctorOptions(Section):
    """Show what this machine can do, and what it lacks: takes seconds, changes nothing."""

    folder: Path = Path()
    """Where runs and data would be written: its file system is tried."""
    hub: bool = False
    """Also try to reach the Hugging Face Hub."""
    format: Literal["table", "json"] = "table"
    """How to print what was found."""


def main(argv: Sequence[str]) -> None:
    options = load_config(DoctorOptions, argv, prog="gptsmith doctor")
    from gptsmith.console import Console
    from gptsmith.inspect import installation
    from gptsmith.inspect.check import attempt, show
    from gptsmith.inspect.machine import machine_checks

    found = [
        *attempt("Python", installation.python_checks), *machine_checks(),
        *attempt("files", installation.file_checks, options.folder),
        *attempt("GPTSMITH_DATA", installation.data_checks),
        *attempt("extras", installation.extra_checks),
        *(attempt("Hub", installation.hub_check) if options.hub else []),
    ]  # fmt: skip
    if options.format == "json":
        terminal.write(json.dumps([check._asdict() for check in found], indent=2))
    else:
        show(found, Console())

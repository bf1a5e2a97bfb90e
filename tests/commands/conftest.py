from collections.abc import Callable
from functools import partial

import pytest

from gptsmith import cli


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def command(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def evaluate(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Runs `gptsmith evaluate`, as `command` does."""
    return partial(command, "evaluate")

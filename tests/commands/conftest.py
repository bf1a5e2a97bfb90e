from collections.abc import Callable
from functools import partial

import pytest

from gptsmith import cli


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def say(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return say


@pytest.fixture
def evaluate(say: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Runs `gptsmith evaluate`, as `say` does."""
    return partial(say, "evaluate")

"""What every test may lean on."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from local_web import Site, site_of

# Two cores are the machine this suite is timed on; `make test` runs a worker on each. Set before
# torch and its OpenMP start, so that the processes that tests start keep it too.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["OMP_NUM_THREADS"] = str(min(max(1, 2 // WORKERS), os.cpu_count() or 1))
# No test may reach the network or an account, whatever the user's machine is logged into.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
# Figures are drawn to files, never to a window.
os.environ["MPLBACKEND"] = "Agg"

# A suite that passed passes again: the same examples each time, however slow the machine is.
# Other examples: pytest --hypothesis-profile search
settings.register_profile("search", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Excerpts of public data sets, in the paths and formats of the complete ones, and GPT-2's
    tokenizer. They are part of the repository; a test of a complete data set: data_sets.py."""
    return ROOT / "tests" / "fixtures" / "data"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 60 thousand bytes of arithmetic: a pattern that small models learn."""
    from gptsmith.data.options import PrepareConfig
    from gptsmith.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} plus {n + 1} is {n + n + 1}. " for n in range(3000)))
    return prepare(PrepareConfig(sources=(str(text),), out=folder / "corpus", tokenizer="byte"))


@pytest.fixture
def user_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, in this process, that must end with exit code 2; its one line of error."""
    from gptsmith import cli

    def run(*words: object) -> str:
        capsys.readouterr()  # of what ran before
        assert cli.main([*map(str, words)]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1, error
        return error

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more threads, and lose much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web server without files; downloads do not wait long before they try again."""
    from gptsmith import download

    monkeypatch.setattr(download, "_PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "*")
    with site_of({}) as site:
        yield site


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and what they start does too: not in tests of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

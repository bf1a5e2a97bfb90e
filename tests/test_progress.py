"""Progress without a terminal: a line from time to time, and the last one."""

from types import SimpleNamespace

import pytest

from gptsmith import progress as module
from gptsmith.progress import WorkProgress, progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list so that tests can change it."""
    time = [0.0]
    # The module's own clock: that of the process drives the event loop of the tests' server.
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def test_last_line_says_that_all_is_done(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in progress(range(9), "likelihoods", 9):
        if step == 6:
            now[0] += 10
    assert capsys.readouterr().err.splitlines() == ["likelihoods: 7 of 9", "likelihoods: 9 of 9"]


def test_work_of_seconds_says_nothing(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(9), "likelihoods", 9)) == list(range(9))
    assert capsys.readouterr().err == ""


def test_interrupted_work_is_not_called_done(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    def steps() -> None:
        for step in progress(range(9), "likelihoods", 9):
            now[0] += 3
            if step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps()
    assert capsys.readouterr().err.splitlines() == ["likelihoods: 2 of 9"]


def test_share_and_status(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress("preparing [x]", 2_000_000, percent=True) as shown:
        now[0] += 10
        shown.update(1_000_000, "5 tokens")
        shown.update(2_000_000, "9 tokens")
    with WorkProgress("reading", 0, percent=True) as shown:
        now[0] += 10
        shown.update(1_000_000, "5 tokens")
    assert capsys.readouterr().err.splitlines() == [
        "preparing [x]: 50%, 5 tokens", "preparing [x]: 100%, 9 tokens", "reading: 5 tokens",
    ]  # fmt: skip

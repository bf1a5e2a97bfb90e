"""Runs whose model is divided among the ranks: evaluated, saved, resumed in any way."""

from pathlib import Path

import pytest
from ranks import STEPS, on, scale
from ranks import pretrain as small_pretrain
from runs import assert_same_checkpoints, assert_same_weights, events, losses, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_BATCHES = ["--train.total-batch-tokens", "128"]
SAVING = ["--save.interval", "8", "--save.keep-last", "9"]


def pretrain(corpus: Path, out: Path, kind: str) -> list[str]:
    return small_pretrain(corpus, out, *SAVING, *TWO_BATCHES, "--optim.kind", kind)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with AdamW."""
    run = tmp_path_factory.mktemp("whole") / "run"
    on(1, pretrain(corpus, run, "adamw"))
    return run


@pytest.fixture(scope="module")
def sharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, sharded between 2 ranks."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    on(2, [*pretrain(corpus, run, "adamw"), "--train.shard"])
    return run


def test_losses_validation_and_samples_are_those_of_one_process(whole: Path, sharded: Path) -> None:
    assert losses(sharded) == pytest.approx(losses(whole), abs=1e-5)
    for kind, field in (("val", "val_loss"), ("sample", "text")):
        a, b = ([event[field] for event in events(run, kind)] for run in (sharded, whole))
        assert a == (pytest.approx(b, abs=1e-5) if kind == "val" else b)
    files = [{p.relative_to(run) for p in run.rglob("*")} for run in (sharded, whole)]
    assert files[0] == files[1]
    assert (sharded / "report.md").read_text()


def test_a_resumed_run_has_the_same_bits(sharded: Path, tmp_path: Path) -> None:
    run = stop_at(8, sharded, tmp_path / "run")
    on(2, ["pretrain", "--out", str(run), "--resume"])
    assert losses(run) == losses(sharded)
    assert_same_checkpoints(run, sharded)
    assert_same_weights(run, sharded)


def test_one_process_resumes_a_sharded_run(sharded: Path, tmp_path: Path) -> None:
    run = stop_at(8, sharded, tmp_path / "run")
    on(1, ["pretrain", "--out", str(run), "--resume"])
    assert losses(run) == pytest.approx(losses(sharded), abs=1e-5)


@scale
@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), (1, 3), (-2, 2), (-3, 2), (2, -2), (2, 3), (3, 2), (3, 1), (3, -3)],
)
def test_resumed_on_another_number_of_ranks(
    before: int, after: int, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    """Negative: so many ranks without sharding."""
    flags = {True: ["--train.shard"], False: ["--no-train.shard"]}
    run = tmp_path / "first"
    on(abs(before), [*pretrain(corpus, run, "adamw"), *flags[before > 0]])
    run = stop_at(8, run, tmp_path / "run")
    on(abs(after), ["pretrain", "--out", str(run), "--resume", *flags[after > 0]])
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


@scale
@pytest.mark.parametrize("ranks", [2, 3])
def test_muon_resumes_with_the_same_bits(ranks: int, corpus: Path, tmp_path: Path) -> None:
    on(ranks, [*pretrain(corpus, tmp_path / "run", "muon"), "--train.shard"])
    run = stop_at(8, tmp_path / "run", tmp_path / "resumed")
    on(ranks, ["pretrain", "--out", str(run), "--resume"])
    assert_same_checkpoints(run, tmp_path / "run")
    assert_same_weights(run, tmp_path / "run")

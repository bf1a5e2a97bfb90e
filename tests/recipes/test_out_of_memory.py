"""A device without the memory for a run: one line says what to do, and no checkpoint is lost."""

from types import SimpleNamespace

import pytest
import torch
from ranks import pretrain
from runs import events

from gptsmith import cli
from gptsmith.recipes import loop
from gptsmith.recipes.options import RecipeConfig, TrainConfig
from gptsmith.recipes.out_of_memory import out_of_memory
from gptsmith.train import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def full(*arguments, **named):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("at", ["Optimizer", "load_parameters"])
def test_a_resumed_run_keeps_its_checkpoints(at, corpus, tmp_path, monkeypatch, capsys) -> None:
    run, again = tmp_path / "run", ["pretrain", "--resume", "--out", str(tmp_path / "run")]
    assert cli.main(pretrain(corpus, run, "--train.steps", "2", "--eval.interval", "0")) == 0
    kept = checkpoint.steps(run / "checkpoints")
    monkeypatch.setattr(loop, at, full)
    assert cli.main([*again, "--train.steps", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cpu is out of memory with train.batch_size 2, after 2 steps: free some" in error
    assert checkpoint.steps(run / "checkpoints") == kept
    monkeypatch.undo()
    assert cli.main([*again, "--train.steps", "3"]) == 0
    assert events(run, "train")[-1]["step"] == 3


def test_a_run_that_could_not_begin_leaves_its_folder_free(corpus, tmp_path, monkeypatch) -> None:
    words = pretrain(corpus, tmp_path / "run", "--train.steps", "1", "--eval.interval", "0")
    monkeypatch.setattr(loop, "Optimizer", full)
    assert cli.main(words) == 2
    monkeypatch.undo()
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("ranks", "train", "remedy"),
    [
        (1, {}, "try --train.activation-checkpointing, or --train.batch-size 4 "
                "--train.total-batch-tokens 256"),
        (1, dict(batch_size=7, activation_checkpointing=True), "try --train.batch-size 2 "
                "--train.total-batch-tokens 256"),
        (2, dict(batch_size=1), "try --train.shard, or --train.activation-checkpointing"),
        (2, dict(batch_size=1, shard=True), "try --train.activation-checkpointing"),
        (1, dict(batch_size=1, activation_checkpointing=True), "try a smaller model or context"),
    ],
)  # fmt: skip
def test_what_helps(ranks, train, remedy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop.distributed, "world_size", lambda: ranks)
    config = RecipeConfig.model_construct(train=TrainConfig(**{"batch_size": 8, **train}))
    plan = SimpleNamespace(
        config=config, rows_per_step=8, runtime=SimpleNamespace(device=torch.device("cuda", 0))
    )
    run = SimpleNamespace(resumed=None, checkpoints=tmp_path / "checkpoints")
    error = torch.OutOfMemoryError("2 GiB")
    error.add_note("the last checkpoint was not written: it is full")
    found = out_of_memory(error, run, plan, step=0, T=32)
    assert str(found).startswith("cuda:0 is out of memory with train.batch_size ")
    assert str(found).endswith(f", after 0 steps: {remedy}")
    assert found.__notes__ == error.__notes__

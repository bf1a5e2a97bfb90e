"""Whole commands on a GPU; see test_gpu.py for how to run them."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu import DEVICE, V, model_of, needs_fp8, on_a_gpu
from runs import assert_same_checkpoints, assert_same_weights, events, finish
from torch import Tensor

from gptsmith import cli

pytestmark = on_a_gpu


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "base"
    assert pretrain(corpus, run, "--train.steps", "30") == 0
    return run


def pretrain(corpus: Path, run: Path, *more: str) -> int:
    return cli.main(pretrain_words(corpus, run, *more))


def pretrain_words(corpus: Path, run: Path, *more: str) -> list[str]:
    return [
        "pretrain", "--data", str(corpus), "--out", str(run), "--train.device", DEVICE,
        "--train.compile", "off", "--model.n-layer", "2", "--model.n-head", "4", "--model.n-embd",
        "64", "--model.context-length", "128", "--train.batch-size", "8", "--eval.interval", "10",
        "--eval.tokens", "2000", "--eval.sample-tokens", "8", "--optim.learning-rate", "0.01",
        "--monitor.trackers", "none", "--monitor.log-interval", "1", *more,
    ]  # fmt: skip


def losses(run: Path, kind: str = "train", name: str = "train_loss") -> list[float]:
    return [event[name] for event in events(run, kind)]


def test_pretraining_learns_and_resumes(corpus: Path, pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(corpus, run, "--train.steps", "30", "--save.interval", "15") == 0
    whole = losses(run)
    assert whole[-1] < whole[0] - 1
    assert whole == pytest.approx(losses(pretrained), rel=0.02)
    shutil.rmtree(run / "checkpoints" / "step-000030")
    assert cli.main(["pretrain", "--resume", "--out", str(run)]) == 0
    assert losses(run)[:15] == whole[:15]
    assert losses(run) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(
    "more",
    [
        ("--train.compile", "off"),
        ("--train.compile", "on"),
        ("--document-mask", "--train.compile", "on", "--model.n-kv-head", "2"),
    ],
    ids=["eager", "compiled", "packed"],
)
def test_deterministic_runs_are_equal_to_the_bit(
    more: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    """Two runs, and one that resumes in the middle, each in a process of its own."""
    a, b = tmp_path / "a", tmp_path / "b"
    words = ["--train.steps", "16", "--save.interval", "8", "--save.keep-last", "3", *more]
    for run in (a, b):
        finish(pretrain_words(corpus, run, "--train.deterministic", *words))
    assert_same_checkpoints(a, b)
    shutil.rmtree(b / "checkpoints" / "step-000016")
    (b / "digests.json").unlink()
    finish(["pretrain", "--resume", "--out", str(b)])
    assert_same_checkpoints(a, b)
    assert_same_weights(a, b)


CHAT = '{"messages": [{"role": "user", "content": "1 plus %d"}, {"role": "assistant", "content": "is %d."}]}\n'  # noqa: E501
PAIR = '{"prompt": "1 plus %d", "chosen": "is %d.", "rejected": "no"}\n'
TEXTS = "label,text\n" + "".join(
    f"{'even' if n % 2 == 0 else 'odd'},{'two ' * (n % 2 == 0)}{n} and {n + 2}\n" for n in range(80)
)


@pytest.mark.parametrize("more", [(), ("--lora.rank", "4")], ids=["all", "lora"])
@pytest.mark.parametrize("kind", ["chat", "classify", "preference"])
def test_fine_tuning(kind: str, more: tuple[str, ...], pretrained: Path, tmp_path: Path) -> None:
    lines = {"chat": CHAT, "preference": PAIR}
    rows = "".join(lines[kind] % (n, n + 1) for n in range(80)) if kind in lines else TEXTS
    data = tmp_path / ("data.jsonl" if kind in lines else "data.csv")
    data.write_text(rows)
    out = tmp_path / "out"
    command = [
        "finetune", kind, "--from", pretrained, "--data", data, "--out", out, "--train.device",
        DEVICE, "--train.epochs", "2", "--train.batch-size", "4", "--monitor.trackers", "none",
        *more,
    ]  # fmt: skip
    assert cli.main([*map(str, command)]) == 0
    assert all(math.isfinite(loss) for loss in losses(out, "val", "val_loss"))
    if kind == "classify":
        assert cli.main(["classify", str(out), "two 3 and 5", "--device", DEVICE]) == 0
    else:
        assert cli.main(["evaluate", str(out), "--device", DEVICE, "--tasks", "skills",
                         "--per-skill", "2"]) == 0  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp16", pytest.param("fp8", marks=needs_fp8)])
def test_precisions_of_a_whole_run(precision: str, corpus: Path, tmp_path: Path) -> None:
    if precision != "bf16" and DEVICE == "cpu":
        pytest.skip(f"{precision} is for GPUs")
    run = tmp_path / "run"
    words = ["--train.steps", "30", "--document-mask", "--train.precision", precision]
    assert pretrain(corpus, run, *words) == 0
    assert losses(run)[-1] < losses(run)[0] - 1
    generate: Callable[..., int] = cli.main
    assert generate(["generate", str(run), "--device", DEVICE, "--prompt", "1 plus",
                     "--max-new-tokens", "20"]) == 0  # fmt: skip
    assert cli.main(["evaluate", str(run), "--device", DEVICE, "--data", str(corpus)]) == 0


def test_ids_on_the_device_are_checked(pretrained: Path) -> None:
    model = model_of({}, DEVICE)
    ids: Tensor = torch.arange(10, device=DEVICE)[None]
    assert model(ids).shape == (1, 10, V)

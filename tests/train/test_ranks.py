"""Several ranks compute what one process computes. Real processes, joined by gloo."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import finish, gptsmith, pretrain, scale, start, torchrun, train, trained
from runs import assert_same_checkpoints, assert_same_weights, events

from gptsmith import cli
from gptsmith.recipes.loop import STOPPED
from gptsmith.train.distributed import Launch, first_host

pytestmark = pytest.mark.usefixtures("one_thread")

EVEN = [dict(kind=kind, number=2, steps=6, dropout=0.2) for kind in ("adamw", "muon")]
# a rank has nothing to do in the last turn
UNEVEN = [dict(kind=kind, number=5, steps=20, dropout=0.1) for kind in ("adamw", "muon")]
BAD = dict(kind="adamw", number=3, steps=2, dropout=0.0, bad=8)


@pytest.fixture(scope="module")
def two() -> list[list[dict]]:
    return trained(2, *EVEN, *UNEVEN, BAD)


def test_two_ranks_equal_one_rank_with_two_micro_batches_bit_for_bit(two) -> None:
    for rank in two:
        for found, job in zip(rank, EVEN, strict=False):
            one = train(**job)
            assert found["losses"] == one["losses"]
            assert found["metrics"] == one["metrics"]
            assert found["norms"] == one["norms"]
            assert found["digest"] == one["digest"]


@pytest.mark.parametrize("kind", [0, 1])
def test_uneven_targets_and_an_empty_share_give_the_gradient_of_one_process(two, kind) -> None:
    one = train(**{**UNEVEN[kind], "steps": 2})
    for rank in two:
        found = rank[len(EVEN) + kind]
        assert found["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
        assert found["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)
        assert found["tokens"] == [5 * 2 * 16] * 20


def test_all_ranks_have_the_same_parameters(two) -> None:
    for a, b in zip(*two, strict=True):
        assert a["digest"] == b["digest"]
        assert str(a["losses"]) == str(b["losses"])
        assert str(a["metrics"]) == str(b["metrics"])


def test_each_rank_keeps_its_part_of_the_optimizer_state(two) -> None:
    for at, job in enumerate(EVEN):
        whole = train(**{**job, "steps": 1})["state"]
        parts = [rank[at]["state"] for rank in two]
        assert sum(parts) == whole
        assert max(parts) < 0.6 * whole


def test_a_bad_batch_of_one_rank_is_skipped_by_all_and_named(two) -> None:
    for rank in two:
        assert math.isnan(rank[-1]["losses"][1])
        first, second = rank[-1]["skipped"]
        assert first == ""
        assert second.endswith("in samples 6..7, samples 8..9, samples 10..11")


# --- the command, which the recipes of other stages share ----------------------------------------


def record(run: Path) -> list[dict]:
    """Without what depends on the clock."""
    timed = {"seconds", "tokens_per_second", "peak_memory_mb", "crc32"}
    found = events(run, "train", "val", "tasks", "sample")
    return [{k: v for k, v in e.items() if k not in timed} for e in found]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[str]:
    """Words that evaluate questions during training: three batches of them."""
    path = tmp_path_factory.mktemp("tasks") / "questions.jsonl"
    questions = [
        {"ctx": f"{n} plus {n + 1} is", "endings": [f"{2 * n + i}" for i in range(4)], "label": 1}
        for n in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, questions)))
    return ["--eval.tasks", "hellaswag_gpt2", "--eval.task-data", str(path)]


@pytest.fixture(scope="module")
def one(corpus, tasks, tmp_path_factory) -> Path:
    """A run of one process, with two micro-batches per step."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert cli.main(pretrain(corpus, run, "--train.total-batch-tokens", "128", *tasks)) == 0
    return run


def test_sigterm_to_one_rank_stops_all_and_resume_ends_as_one_process_does(
    corpus, one, tasks, tmp_path
) -> None:
    """Validation loss, tasks, samples, metrics and weights of 2 ranks, stopped at any step and
    resumed, are those of 1 rank; so are those of 1 rank that resumes what 2 began."""
    run = tmp_path / "run"
    ranks = start(2, ["-m", "gptsmith", *pretrain(corpus, run, *tasks)])
    while not (run / "metrics.jsonl").exists() or not events(run, "train"):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGTERM)
    done = finish(ranks)
    assert [code for code, _, _ in done] == [STOPPED, STOPPED], done
    assert "SIGTERM: saved at step" in done[0][2]
    assert done[1][1:] == ("", "")
    shutil.copytree(run, tmp_path / "alone")
    codes, said = gptsmith(2, [*pretrain(corpus, run, *tasks), "--resume"])
    assert codes == [0, 0], said
    assert cli.main(["pretrain", "--out", str(tmp_path / "alone"), "--resume"]) == 0
    for resumed in (run, tmp_path / "alone"):
        assert record(resumed) == record(one)
        assert len([e for e in record(resumed) if e["event"] == "tasks"]) == 3
        assert_same_checkpoints(resumed, one)
        assert_same_weights(resumed, one)


def test_an_occupied_folder_is_one_message_and_ends_all_ranks(corpus, one) -> None:
    began = time.monotonic()
    codes, said = gptsmith(2, pretrain(corpus, one))
    assert sorted(codes) == [1, 2]
    assert said.count("\n") == 1
    assert said.startswith(f"gptsmith pretrain: {one} contains a run that ended at step 16")
    assert time.monotonic() - began < 60  # nobody waits for a time limit


@pytest.mark.parametrize("options", [["--train.shard"], pytest.param([], marks=scale)])
def test_a_full_disk_of_rank_0_is_its_message_and_its_exit_code(corpus, tmp_path, options) -> None:
    """torchrun stops all ranks when the first one ends, which has to be the one with the error."""
    words = pretrain(corpus, tmp_path / "run", "--optim.kind", "adamw", *options)
    code, said = torchrun(2, words, file_bytes=16_000)
    assert code == 1
    assert said.count("gptsmith pretrain: ") == 1, said
    assert "File too large" in said
    first = said.partition("Root Cause")[2]
    assert re.search(r"rank +: 0 .*\n +exitcode +: 1 ", first), said


# --- who is who ----------------------------------------------------------------------------------


def test_torchrun_and_srun_say_who_is_who() -> None:
    torchrun = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="7")
    assert Launch.from_environment(torchrun) == Launch(5, 8, 1, "a", 7)
    step = dict(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_JOB_ID="70123", SLURM_NTASKS="4")
    nodes = dict(SLURM_STEP_NUM_TASKS="4", SLURM_STEP_NODELIST="gpu[07-09,11],big1")
    assert Launch.from_environment({**step, **nodes}) == Launch(3, 4, 1, "gpu07", 30_123)
    for seen, local in (("0,1", 1), ("1", 0)):  # all GPUs of the machine, or its own only
        launch = Launch.from_environment({**step, **nodes, "CUDA_VISIBLE_DEVICES": seen})
        assert launch == Launch(3, 4, local, "gpu07", 30_123)
    # a batch script, and a process that was started alone
    assert Launch.from_environment(step) is None
    assert Launch.from_environment({**torchrun, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Launch.from_environment({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("a,b", "a"),
        ("n[3,5]", "n3"),
        ("n[003-010]-ib,x", "n003-ib"),
        ("n-1", "n-1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_single_process_does_not_import_torch_distributed() -> None:
    code = (
        "import sys; from gptsmith.train import distributed as d\n"
        "with d.connected(): assert (d.rank(), d.world_size(), d.sums(1, 2)) == (0, 1, [1, 2])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

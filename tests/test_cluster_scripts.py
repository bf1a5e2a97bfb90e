"""The scripts for clusters: their shell and YAML, their flags, and what they do when a job ends.

srun, scontrol and gptsmith are stand-ins: programs that write down how they were called.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from benchmarks import ranks

from gptsmith.commands.pretrain import recipe_config
from gptsmith.config import load_config
from gptsmith.data.options import PrepareConfig
from gptsmith.recipes.options import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "configs" / "slurm"
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def run(script: Path, folder: Path, *words: str, ends_with: int = 0, **env: str) -> tuple[int, str]:
    """The exit code of a script, and the calls of the stand-ins."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "gptsmith"):
        code = ends_with if name != "scontrol" else 0
        (programs / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >>"{folder}/calls"\nexit {code}\n'
        )
        (programs / name).chmod(0o755)
    (folder / "calls").write_text("")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **env}
    done = subprocess.run(["bash", str(script), *words], cwd=folder, env=environment)
    return done.returncode, (folder / "calls").read_text()


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_job_that_saved_before_its_limit_queues_itself_again(tmp_path: Path, code: int) -> None:
    words = ["recipe.yaml", "--data", "data/c", "--out", "runs/r"]
    ended, calls = run(
        SLURM / "pretrain.sbatch", tmp_path, *words, ends_with=code, SLURM_JOB_ID="42"
    )
    start = f"srun --kill-on-bad-exit=0 gptsmith pretrain {' '.join(words)}"
    if code == 75:
        assert (ended, calls) == (0, f"{start}\nscontrol requeue 42\n")
    else:
        assert (ended, calls) == (code, f"{start}\n")
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/config.yaml").write_text("")
    _, calls = run(SLURM / "pretrain.sbatch", tmp_path, *words, SLURM_JOB_ID="42")
    assert calls == f"{start}\n"  # preempted before its first checkpoint
    (tmp_path / "runs/r/checkpoints/step-000000").mkdir(parents=True)
    (tmp_path / "runs/r/checkpoints/step-000000/manifest.json").write_text("")
    _, calls = run(SLURM / "pretrain.sbatch", tmp_path, *words, SLURM_JOB_ID="42")
    assert calls == f"{start} --resume\n"


def test_a_job_of_an_array_prepares_its_share(tmp_path: Path) -> None:
    array = dict(SLURM_ARRAY_TASK_COUNT="16", SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="4")
    _, calls = run(SLURM / "prepare.sbatch", tmp_path, "texts", "--out", "data/c", **array)
    config = load_config(PrepareConfig, shlex.split(calls)[2:], prog="", positional="sources")
    assert (config.tasks, config.task, config.workers) == (16, 3, 4)
    # one of them again, alone
    _, calls = run(SLURM / "prepare.sbatch", tmp_path, "texts", **array, TASKS="64")
    assert "--tasks 64 --task 3" in calls


def test_flags_of_the_scripts_and_of_the_page_exist() -> None:
    sky = yaml.safe_load((ROOT / "configs/skypilot/pretrain.yaml").read_text())
    assert subprocess.run(["bash", "-n", "-c", sky["run"]]).returncode == 0
    text = "\n".join([sky["run"], PAGE, *(p.read_text() for p in SLURM.iterdir())])
    text = text.replace("\\\n", " ")
    trains = re.findall(r"(?:-m gptsmith pretrain|pretrain\.sbatch) (configs/.*)", text)
    assert len(trains) >= 4
    for words in trains:
        argv = shlex.split(words.replace("$RESUME", ""))
        assert recipe_config("pretrain", PretrainConfig, [str(ROOT / argv[0]), *argv[1:]]).data
    prepares = re.findall(r'^(?:#.*")?gptsmith prepare (data/[^"\n]*)', text, re.MULTILINE)
    assert len(prepares) >= 3
    for words in prepares:
        load_config(PrepareConfig, shlex.split(words), prog="", positional="sources")


def test_the_tables_of_the_page_are_computed() -> None:
    assert ranks.time_table() in PAGE
    assert ranks.memory_table() in PAGE
    assert "| gpt2 | 1 | 524,288 | 1,078 ms | 0.0 (0.0) ms" in PAGE
    # the memory that was measured on one H200 with micro-batches of 32: 15,796 MiB
    c = ranks.ModelConfig.preset("gpt2")
    total = ranks.training_memory(c, 32, 1024, autocast="cuda", chunk_bytes=2**29).total / 2**20
    assert total == pytest.approx(15_796, rel=0.05)

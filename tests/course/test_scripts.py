"""The course's scripts: the tiny ones run, the full ones call what they say and resume."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptsmith.commands.pretrain import recipe_config
from gptsmith.config import load_config
from gptsmith.data.options import PrepareConfig
from gptsmith.recipes.options import ChatConfig, PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
FEW = "--train.batch-size 4 --eval.tokens 500 --eval.sample-tokens 5 --monitor.trackers none"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with course/ and configs/, as the repository has them."""
    shutil.copytree(ROOT / "course", tmp_path / "course")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def run(folder: Path, script: str, words: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A script with these words, gptsmith being the one that is tested."""
    path = os.pathsep.join(
        [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    return subprocess.run(
        [str(folder / "course" / script), *shlex.split(words)],
        env=os.environ | {"PATH": path} | env, capture_output=True, text=True,
    )  # fmt: skip


def test_the_tiny_scripts_train_a_model_that_answers(folder: Path, corpus: Path) -> None:
    shutil.copytree(corpus, folder / "data/course-tiny")
    done = run(folder, "train_tiny.sh", f"{FEW} --train.steps 2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ")
    done = run(folder, "sft_tiny.sh", f"{FEW} --train.steps 2 --questions 100")
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/course-tiny-chat/chat_template.jinja").is_file()


@pytest.mark.parametrize("job", [{}, {"SLURM_JOB_ID": "42"}], ids=["here", "Slurm"])
def test_the_full_scripts_prepare_once_train_and_resume(folder: Path, job: dict[str, str]) -> None:
    """srun, scontrol and gptsmith are stand-ins that write down how they were called."""
    calls, start = folder / "calls", "srun --kill-on-bad-exit=0 " if job else ""
    env = job | {"SLURM_SUBMIT_DIR": str(folder)} if job else {}

    def called(script: str, words: str, code: int = 0) -> list[str]:
        write_stand_ins(folder, calls, code)
        calls.write_text("")
        assert run(folder, script, words, **env).returncode == (0 if code == 75 and job else code)
        return calls.read_text().splitlines()

    prepare, train = called("train_full.sh", "--train.seed 5")
    tokens = load_config(PrepareConfig, shlex.split(prepare)[2:], prog="", positional="sources")
    argv = shlex.split(train.removeprefix(start))[2:]
    config = recipe_config("pretrain", PretrainConfig, [str(folder / argv[0]), *argv[1:]])
    assert (config.data, config.train.seed) == (tokens.out, 5)
    assert (config.model.n_embd, config.model.n_layer) == (512, 12)

    prepare, tune = called("sft_full.sh", "chats.jsonl --lora.rank 8")
    assert "prepare --format chat chats.jsonl" in prepare
    chat = load_config(ChatConfig, shlex.split(tune.removeprefix(start))[3:], prog="")
    assert (chat.base, chat.lora.rank) == (config.out, 8)

    for file in (tokens.out / "manifest.json", config.out / "config.yaml"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("")
    again = called("train_full.sh", "")
    assert again == [f"{start}gptsmith pretrain configs/course-full.yaml --data {tokens.out} "
                     f"--out {config.out} --resume"]  # fmt: skip
    stopped = called("train_full.sh", "", code=75)  # saved before the limit of the job
    assert stopped == again + (["scontrol requeue 42"] if job else [])
    assert called("train_full.sh", "", code=2) == again
    prepare, _train, _generate = called("train_tiny.sh", "")
    assert prepare == "gptsmith prepare pydocs --tokenizer byte --out data/course-tiny"
    assert run(folder, "sft_full.sh").stderr.endswith("course/sft_full.sh chats.jsonl\n")


def write_stand_ins(folder: Path, calls: Path, code: int) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "gptsmith"):
        script = folder / "bin" / name
        ends_with = 0 if name == "scontrol" else code
        script.write_text(f'#!/bin/sh\necho {name} "$@" >>"{calls}"\nexit {ends_with}\n')
        script.chmod(0o755)

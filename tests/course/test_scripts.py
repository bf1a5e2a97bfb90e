"""The course's scripts: the tiny ones run, the full ones call what they say and resume."""

import os
import re
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
        env=os.environ | {"PATH": path} | env,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
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

    # Stopped before its first checkpoint, then between that and the next.
    unfinished = "checkpoints/step-000100.tmp-0123abcd/optimizer.safetensors"
    written = (tokens.out / "manifest.json", config.out / "config.yaml", config.out / unfinished)
    for file in (folder / name for name in written):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    assert "--resume" not in called("train_full.sh", "")[0]
    (folder / config.out / "checkpoints/step-000100").mkdir()
    (folder / config.out / "checkpoints/step-000100/manifest.json").write_text("")
    again = called("train_full.sh", "")
    assert again == [f"{start}gptsmith pretrain configs/course-full.yaml --data {tokens.out} "
                     f"--out {config.out} --resume"]  # fmt: skip
    stopped = called("train_full.sh", "", code=75)  # saved before the limit of the job
    assert stopped == again + (["scontrol requeue 42"] if job else [])
    assert called("train_full.sh", "", code=2) == again
    prepare, _train, _generate = called("train_tiny.sh", "")
    assert prepare == "gptsmith prepare pydocs --tokenizer byte --out data/course-tiny"
    assert run(folder, "sft_full.sh").stderr.endswith("course/sft_full.sh chats.jsonl\n")


@pytest.mark.parametrize("script", ["train_tiny.sh", "sft_tiny.sh", "sft_full.sh"])
def test_every_script_resumes_from_a_checkpoint_and_not_without(folder: Path, script: str) -> None:
    write_stand_ins(folder, folder / "calls", 0)
    words = "chats.jsonl" if script == "sft_full.sh" else ""
    resumed = []
    for _ in range(3):
        (folder / "calls").write_text("")
        done = run(folder, script, words)
        assert (done.returncode, done.stderr) == (0, "")
        train = next(x for x in (folder / "calls").read_text().splitlines() if " --out runs/" in x)
        resumed.append(train.endswith(" --resume"))
        out = folder / re.search(r"--out (\S+)", train)[1]
        (out / "checkpoints/step-000000").mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text("")
        if len(resumed) == 2:
            (out / "checkpoints/step-000000/manifest.json").write_text("")
    assert resumed == [False, False, True]


def test_no_script_expands_an_empty_array_as_bash_4_4_does() -> None:
    """Under `set -u` older ones, such as that of macOS, end at "${words[@]}"."""
    for script in (ROOT / "course").glob("*.sh"):
        text = script.read_text()
        assert not re.search(r'(?<!\+)"\$\{\w+\[@\]\}"', text), script.name


def write_stand_ins(folder: Path, calls: Path, code: int) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "gptsmith"):
        script = folder / "bin" / name
        ends_with = 0 if name == "scontrol" else code
        script.write_text(
            f'#!/bin/sh\necho {name} "$@" >>"{calls}"\ncat >/dev/null\nexit {ends_with}\n'
        )
        script.chmod(0o755)

"""The demo, as in the README but with shorter training."""

import subprocess
import sys
from pathlib import Path

from runs import events


def demo(folder: Path, *more: str) -> str:
    short = ["--steps", "12", "--chat-steps", "10", "--per-skill", "2", "--questions", "400"]
    argv = [sys.executable, "-m", "gptsmith", "demo", "--folder", str(folder), *short, *more]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_runs_every_stage_and_resumes(tmp_path):
    output = demo(tmp_path)
    for verb in ("prepare", "pretrain", "generate", "evaluate", "finetune chat", "chat"):
        assert f"$ gptsmith {verb} " in output
    for word in ("before", "after", "untuned", "with examples", "held-out", "other phrasings"):
        assert word in output
    assert "min for 22 training steps here" in output
    for run, steps in (("demo", 12), ("demo-chat", 10)):  # fixed work on any machine
        assert events(tmp_path / "runs" / run, "train")[-1]["step"] == steps
    assert output.count("> ") >= 14  # what the user says in the conversations
    assert "> Who are you?\n" in output
    assert "unknown function" in output
    for run in ("demo", "demo-chat"):
        for name in ("report.md", "curves.png", "samples.txt", "model.safetensors", "skills.json"):
            assert (tmp_path / "runs" / run / name).stat().st_size > 0
    again = demo(tmp_path, "--reward", "--reward-steps", "2")  # nothing is trained twice
    assert "$ gptsmith pretrain" not in again
    assert "$ gptsmith finetune chat" not in again
    assert "$ gptsmith finetune reward" in again  # but practised now
    assert "before and after practice" in again
    assert "held-out" in again
    assert (tmp_path / "runs" / "demo-reward" / "skills.json").stat().st_size > 0
    assert f"gptsmith chat {tmp_path / 'runs' / 'demo-reward'}" in again
    assert "training steps here" not in again

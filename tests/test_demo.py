"""The demo, with a shortened horizon, as the README has it."""

import subprocess
import sys
from pathlib import Path


def demo(folder: Path, *more: str) -> str:
    argv = [sys.executable, "-m", "gptsmith", "demo", "--folder", str(folder), *more]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_story_and_again(tmp_path):
    told = demo(tmp_path, "--seconds", "6")
    for word in ("gptsmith prepare", "gptsmith pretrain", "gptsmith generate", "before", "after"):
        assert word in told
    for name in ("report.md", "curves.png", "samples.txt", "model.safetensors"):
        assert (tmp_path / "runs" / "demo" / name).stat().st_size > 0
    again = demo(tmp_path, "--seconds", "6")  # nothing is done twice
    assert "$ gptsmith pretrain" not in again

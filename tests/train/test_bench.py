"""The speed benchmark, as far as it must work where no other test looks: a bare GPU machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What a stock PyTorch image need not have. Read by every Python process of the test, the
# benchmark's contestants among them.
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
"""
ABSENT = (
    "datasets", "httpx", "matplotlib", "mlflow", "peft", "pyarrow", "rich", "safetensors",
    "tensorboard", "tiktoken", "tokenizers", "trackio", "transformers", "tyro", "wandb", "yaml",
)  # fmt: skip


def test_the_gpu_benchmark_needs_torch_and_pydantic_only(tmp_path: Path) -> None:
    """On the CPU, with a tiny model, by the path that a GPU takes: no recipe is read."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=set(ABSENT)))
    sizes = ["--model", "nano", "--batch-size", "1", "--rounds", "2", "--steps", "1", "--eager"]
    argv = ["-m", "benchmarks", "train", "--device", "cpu", *sizes, "--json", tmp_path / "figures"]
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "transformers, fp32, eager: left out, transformers is not installed" in done.stdout
    (ours,) = json.loads((tmp_path / "figures").read_text())
    assert ours["name"] == "gptsmith, low precision, eager"
    assert len(ours["rates"]) == len(ours["shares"]) == 2
    assert min(ours["rates"]) > 0
    assert 50 < ours["peak_mib"] < 20_000
    assert "gptsmith, low precision, eager" in done.stdout

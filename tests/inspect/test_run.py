"""What `gptsmith inspect` says about a run folder."""

import io
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal as file_size

from gptsmith.inspect.run import show_run
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.run.create import open_for_training
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint


def shown(run: Run) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    show_run(run, console)
    return console.export_text()


def test_run_report(tmp_path: Path) -> None:
    tokenizer = Tokenizer.byte()
    config = ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size)
    with open_for_training(tmp_path / "run", {"data": {"path": "x"}}, config, tokenizer) as run:
        pass
    model = GPTModel(config)
    assert "unfinished" in shown(run)
    assert "none" in shown(run).splitlines()[-1]

    events = [
        {"event": "train", "step": 5, "train_loss": 5.5, "tokens": 1280, "learning_rate": 1e-3},
        {"event": "val", "step": 5, "val_loss": 5.25},
        {"event": "train", "step": 10, "train_loss": 4.5, "tokens": 2560, "learning_rate": 5e-4},
        {"event": "val", "step": 10, "val_loss": 5.75, "val_reward": 0.0},
    ]
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    groups = {"model": model.state_dict(), "optimizer": {"m": torch.zeros(4)}}
    intact, broken = (checkpoint.save(run.checkpoints, step, groups, {}) for step in (5, 10))
    (broken / "optimizer.safetensors").write_bytes(b"cut short")
    (run.checkpoints / "step-000011").write_text("no checkpoint")
    checkpoint.save_tensors(run.weights, model.state_dict())

    size = file_size(sum(file.stat().st_size for file in intact.iterdir()))
    text = " ".join(shown(run).split())
    for part in (
        "1 layer, 64 wide, 2 heads of 32",
        "mask causal()",
        f"{sum(p.numel() for p in model.parameters()):,}",
        "step 10 train_loss 4.5",
        "best val_loss 5.2500 at step 5",
        "best val_reward 0.0000 at step 10",
        f"step 5 {size} intact step 10",
        "damaged: ",
        "optimizer.safetensors has 9 bytes instead of",
        "model.safetensors",
    ):
        assert part in text, part

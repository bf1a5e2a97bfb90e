"""For how long a checkpoint stops training, written at once and in the background: GPT-2 124M with
AdamW's state, 1.5 GB, in a temporary folder."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.tuning import trainable_state_dict
from gptsmith.train import checkpoint
from gptsmith.train.checkpoint_writer import CheckpointWriter
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig


def save(
    model: GPTModel, optimizer: Optimizer, writer: CheckpointWriter, folder: Path
) -> tuple[float, float]:
    """Seconds until training could go on, and until the checkpoint is on disk."""
    began = time.perf_counter()
    state = optimizer.state_tensors(writer.memory)
    weights = trainable_state_dict(model)
    if writer.memory is not None:
        weights = writer.memory.copy(weights)
    tensors = {"model": weights, "optimizer": state}

    def write() -> None:
        checkpoint.save(folder, 1, tensors, {})

    writer.start(write)
    stopped = time.perf_counter() - began
    writer.wait()
    return stopped, time.perf_counter() - began


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks saves", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: temporary files)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here")
        return
    model = GPTModel(ModelConfig.preset("gpt2")).to(device)
    optimizer = Optimizer(model, OptimConfig(kind="adamw"), device.type)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    writers = {"at once": CheckpointWriter(False), "in the background": CheckpointWriter(True)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for _ in range(options.rounds + 1):  # the first one is not counted
            for name, writer in writers.items():
                found[name].append(save(model, optimizer, writer, Path(folder)))
    print(f"| written, on {device} | training stops for | on disk after |\n|---|---:|---:|")
    for name, times in found.items():
        stopped, whole = (statistics.median(each) for each in zip(*times[1:], strict=True))
        print(f"| {name} | {stopped * 1000:,.0f} ms | {whole * 1000:,.0f} ms |")

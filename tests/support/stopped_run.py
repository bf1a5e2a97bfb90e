"""A small run to create, save steps of, and stop, without training it."""

from pathlib import Path
from typing import Any

import torch

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.run.create import open_for_training
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=257)
CONFIG: dict[str, Any] = {
    "stage": "pretrain", "data": "data/corpus", "resume": False, "title": "naïve: yes",
    "train": {"steps": 20, "seed": 1},
}  # fmt: skip
TOKENIZER = Tokenizer.byte()


def create(path: Path, model: ModelConfig = SMALL, **options: Any) -> Run:
    tokenizer = options.pop("tokenizer", TOKENIZER)
    return open_for_training(path, CONFIG, model, tokenizer, **{"corpus": "c0ffee", **options})


def model_of(seed: int, config: ModelConfig = SMALL) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(config).eval()


def save(run: Run, step: int, best_step: int | None = None) -> None:
    state = {"best_step": best_step, "best_loss": None if best_step is None else 1.0}
    checkpoint.save(run.checkpoints, step, {"model": model_of(step).state_dict()}, state)


def same(model: GPTModel, seed: int) -> bool:
    ids = torch.arange(10)[None]
    return torch.equal(model(ids), model_of(seed)(ids))


def flip(path: Path, at: int = -3) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

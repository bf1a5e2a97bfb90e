"""Run folders for tests: untrained ones, records of training, commands that are killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from random_weights import randomize
from torch import Tensor

from gptsmith.interop.external_model import ExternalModel
from gptsmith.model import state_dict
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run, layout
from gptsmith.run.create import create_from_weights, open_for_training
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint

GPTSMITH = [sys.executable, "-m", "gptsmith"]


def untrained(
    path: Path, tokenizer: Tokenizer, template: str | None = None, **axes: object
) -> Path:
    """A run of a small model with the weights of its initialisation."""
    size = dict(n_layer=2, n_head=2, n_embd=32, context_length=64)
    config = ModelConfig(**{**size, **axes}, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    with open_for_training(
        path, {"note": "untrained"}, config, tokenizer, template=template
    ) as run:
        run.write_weights(layout.WEIGHTS, GPTModel(config).state_dict())
    return path


def random_run(
    path: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    size: float = 0.25,
) -> Run:
    """An imported run, of bytes unless told otherwise, in which every weight matters."""
    model = (GPTClassifier if config.labels else GPTModel)(config)
    randomize(model, seed, size)
    tensors = ((name, tensor.to(dtype)) for name, tensor in model.state_dict().items())
    origin = {"import": "random numbers"}
    tokenizer = tokenizer or Tokenizer.byte()
    return create_from_weights(path, origin, config, tokenizer, tensors, dtype, template)


def imported_model(found: ExternalModel) -> GPTModel:
    return state_dict.load(found.config, dict(found.tensors()), "imported").eval()


def imported_run(path: Path, found: ExternalModel) -> Run:
    return create_from_weights(
        path, dict(found.origin), found.config, found.tokenizer, found.tensors(), found.dtype,
        found.template,
    )  # fmt: skip


def events(run: Path, *kinds: str) -> list[dict]:
    """The record of a run's training, of these kinds alone if any are given."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if not kinds or e["event"] in kinds]


def losses(run: Path) -> list[float]:
    return [event["train_loss"] for event in events(run, "train")]


def stop_at(step: int, run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was when it was stopped after this step."""
    shutil.copytree(run, copy)
    for later in (s for s in checkpoint.steps(copy / "checkpoints") if s > step):
        shutil.rmtree(copy / "checkpoints" / f"step-{later:06d}")
    for name in ("model.safetensors", "report.md", "digests.json"):
        (copy / name).unlink(missing_ok=True)  # a LoRA run has an adapter
    return copy


def finish(words: list[str]) -> str:
    """Runs `gptsmith WORDS` in a process of its own, which must succeed; its standard error."""
    done = subprocess.run([*GPTSMITH, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kill_after(step: int, words: list[str], run: Path) -> None:
    """Starts `gptsmith WORDS`, which trains `run`; SIGKILL once this step has a checkpoint."""
    process = subprocess.Popen(
        [*GPTSMITH, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while max(checkpoint.steps(run / "checkpoints"), default=-1) < step:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_same_weights(a: Path, b: Path) -> None:
    """The models of two runs are equal, bit for bit."""
    _assert_equal(*(Run.open(run).load_model().state_dict() for run in (a, b)))


def assert_same_checkpoints(a: Path, b: Path) -> None:
    """The last checkpoints of two runs hold the same step, weights and optimizer state."""
    one, two = (checkpoint.find(run / "checkpoints")[0] for run in (a, b))
    assert one.step == two.step
    for group in ("model", "optimizer"):
        _assert_equal(one.load(group), two.load(group))


def _assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def write_inputs(folder: Path) -> None:
    """Small files to train on: text.txt, short.txt, rows.csv, short.csv, rows.json, chat.jsonl,
    pairs.jsonl, prompts.jsonl."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home", "again"]
    rng = random.Random(0)
    text = "\n".join(" ".join(rng.choices(words, k=12)) + "." for _ in range(200))
    (folder / "text.txt").write_text(text)
    (folder / "short.txt").write_text(text[:500])
    labelled = [(f"{word} {n}", "abc"[i % 3]) for n in range(4) for i, word in enumerate(words)]
    for name, rows in (("rows.csv", labelled), ("short.csv", labelled[:5])):
        lines = "".join(f"{text},{label}\n" for text, label in rows)
        (folder / name).write_text("text,label\n" + lines)
    rows = [{"instruction": text, "input": "", "output": label} for text, label in labelled]
    (folder / "rows.json").write_text(json.dumps(rows))
    with (folder / "chat.jsonl").open("w") as file:
        for turns in labelled:
            pairs = zip(("user", "assistant"), turns, strict=True)
            messages = [{"role": role, "content": content} for role, content in pairs]
            file.write(json.dumps({"messages": messages}) + "\n")
    with (folder / "pairs.jsonl").open("w") as file:
        for text, label in labelled:
            pair = {"prompt": text, "chosen": label.upper(), "rejected": label * 2}
            file.write(json.dumps(pair) + "\n")
    with (folder / "prompts.jsonl").open("w") as file:
        for text, label in labelled:
            file.write(json.dumps({"question": text, "answer": label}) + "\n")

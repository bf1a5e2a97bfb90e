"""Several processes that train together, on this machine: `start` and `finish` them.

As a script, it is one of them: trains the small models of `train` and prints what came out.
"""

import hashlib
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from gptsmith import cli
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model import lora
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.flops import parameters
from gptsmith.model.gpt import GPTModel
from gptsmith.model.init import deferred_init, init_parameter
from gptsmith.recipes.micro_batches import micro_batches
from gptsmith.train import distributed, sharding
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.step import train_steps

STEPS = 16
# Words of the command for a small run with dropout.
MODEL = [
    "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.dropout", "0.1",
    "--model.context-length", "32",
]  # fmt: skip
TRAINING = [
    "--train.steps", str(STEPS), "--train.batch-size", "2", "--train.num-threads", "1",
    "--train.device", "cpu", "--train.precision", "fp32", "--train.compile", "off",
    "--save.seconds", "600",
    "--eval.interval", "8", "--eval.tokens", "2000", "--eval.sample-tokens", "4",
    "--monitor.log-interval", "1", "--monitor.trackers", "none", "--optim.learning-rate", "0.01",
]  # fmt: skip
SECONDS = 240  # deadline of every process; a machine with other work is slow
T, V = 16, 24
SCALE = bool(os.environ.get("GPTSMITH_SCALE"))
scale = pytest.mark.skipif(not SCALE, reason="make test-scale")


def start(count: int, words: Sequence[str], **environment: str) -> list[subprocess.Popen]:
    """Start `count` ranks of a Python command, each with one thread."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(
        WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    return [
        subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def torchrun(count: int, words: Sequence[str], file_bytes: int = -1) -> tuple[int, str]:
    """Exit code and output of a command of gptsmith on so many ranks of torchrun.

    file_bytes: no file can grow beyond them, as on a full disk.
    """
    limits = (file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "gptsmith", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )  # fmt: skip
    return done.returncode, done.stdout


def finish(ranks: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each; all are killed at the deadline."""
    end = time.monotonic() + SECONDS
    try:
        return [
            (rank.wait(), out, err)
            for rank in ranks
            for out, err in [rank.communicate(timeout=max(0.1, end - time.monotonic()))]
        ]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
                rank.communicate()


def pretrain(corpus: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", "--data", str(corpus), "--out", str(out), *MODEL, *TRAINING, *more]


def gptsmith(count: int, words: Sequence[str]) -> tuple[list[int], str]:
    """The exit codes of `gptsmith WORDS` on so many ranks, and all that they said."""
    done = finish(start(count, ["-m", "gptsmith", *words]))
    return [code for code, _, _ in done], "".join(out + err for _, out, err in done)


def on(count: int, words: list[str]) -> None:
    """Run `gptsmith WORDS` on so many ranks; it must succeed."""
    if count == 1:
        assert cli.main(words) == 0
        return
    codes, said = gptsmith(count, words)
    assert codes == [0] * count, said


class Rows:
    """Rows with very different numbers of targets, some with none."""

    T, per_epoch = T, 1000

    def batch(self, first: int, count: int) -> Batch:
        seeds = (torch.Generator().manual_seed(i) for i in range(first, first + count))
        ids = torch.stack([torch.randint(V, (T + 1,), generator=seed) for seed in seeds])
        targets = ids[:, 1:].clone()
        for n, target in enumerate(targets, first):
            target[: (0, T - 1, T)[n % 3]] = IGNORE_INDEX
        return Batch(ids[:, :-1], targets, name=f"samples {first}..{first + count - 1}")


def small_model(dropout: float = 0.0, **options: bool) -> ModelConfig:
    sizes = dict(n_layer=2, n_head=2, n_embd=16, context_length=T, vocab_size=V)
    return ModelConfig(**sizes, dropout=dropout, **options)


def train(
    kind: str,
    number: int,
    steps: int,
    dropout: float,
    bad: int = -1,
    shard: bool = False,
    compiled: bool = False,
    checkpointing: bool = False,
    only: str = "",
    lora_rank: int = 0,
    loss_scale: float = 0.0,
    precision: str = "fp32",
    **model_options: bool,
) -> dict:
    """Train on `number` micro-batches of two rows per step.

    bad: a row whose loss is NaN. only: train nothing but the parameters whose names begin so.
    loss_scale: with a loss scaler, and a row of the embedding whose gradient overflows. Returns
    losses, metrics and gradient norms, why a step was skipped, the scaler's scale, a digest of all
    parameters, the elements of the optimizer's state that this rank keeps, and the bytes of its
    parameters, gradients and optimizer state.
    """
    # Unless the model is sharded, weights differ at first: those of rank 0 count.
    torch.manual_seed(0 if shard else distributed.rank())
    model = GPTModel(small_model(dropout, **model_options))
    model.activation_checkpointing = checkpointing
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(only))
    if lora_rank:
        lora.attach(model, LoraConfig(rank=lora_rank), [1, 2])
    if shard and distributed.world_size() > 1:
        sharding.shard(model, torch.device("cpu"), compiled)
    optimizer = Optimizer(model, OptimConfig(kind=kind), "cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale) if loss_scale else None

    def loss(model: GPTModel, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        worse = torch.nan if batch.name.startswith(f"samples {bad}..") else 1.0
        total = next_token_loss(model, batch) * worse
        if loss_scale:  # a gradient that is finite until it is scaled, for a loss of 0
            row = model.embedding.token.weight[0].sum()
            total = total + (row - row.detach()) * 3e38
        targets = (batch.targets != IGNORE_INDEX).sum()
        return total, {"doubled": 2 * total, "targets": targets.float()}

    def batches(step: int) -> list[Batch]:
        rank, ranks = distributed.rank(), distributed.world_size()
        return micro_batches(Rows(), step * number * 2, number * 2, 2, rank, ranks)

    run = train_steps(
        model, loss, batches, optimizer,
        learning_rate=lambda step: 0.01, precision=Precision(precision, "cpu", ""),
        max_grad_norm=0.5, seed=3, scaler=scaler,
    )  # fmt: skip
    done = [next(run)]
    with sharding.gathered(model):
        if distributed.rank() == 0:  # alone, as for samples
            model.hidden(Rows().batch(0, 2).inputs)
    done += itertools.islice(run, steps - 1)
    state = [x for o in optimizer.optimizers for s in o.state.values() for x in s.values()]
    state = [sharding.local(x) for x in state]
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(sharding.whole(parameter.detach()).numpy().tobytes())
    parameters = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    kept = [*map(sharding.local, parameters), *state]
    return {
        "losses": [step.loss for step in done],
        "metrics": [step.metrics for step in done],
        "norms": [step.grad_norm for step in done],
        "tokens": [step.tokens for step in done],
        "skipped": [step.skipped for step in done],
        "digest": digest.hexdigest(),
        "scale": scaler.get_scale() if scaler else 0.0,
        "state": sum(x.numel() for x in state if x.dim()),
        "bytes": sum(x.numel() * x.element_size() for x in kept),
    }


def start_of_a_large_model() -> dict:
    """The peak of this rank's memory while a sharded model is made, in parts of its weights."""
    config = ModelConfig(n_layer=6, n_head=6, n_embd=384, context_length=T, vocab_size=V)
    peaks = []
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is now what is resident
    peaks.append(peak_memory_kib())
    with deferred_init():
        model = GPTModel(config)
    sharding.shard(model, torch.device("cpu"))
    sharding.init(model, partial(init_parameter, config=config))
    peaks.append(peak_memory_kib())
    return {"peak": (peaks[1] - peaks[0]) * 1024 / (4 * parameters(config))}


def peak_memory_kib() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def trained(count: int, *jobs: dict) -> list[list[dict]]:
    """For each rank, the results of `train` for each of the jobs; of an empty one, those of
    `start_of_a_large_model`."""
    found = finish(start(count, [__file__, json.dumps(jobs)], PYTHONPATH=os.pathsep.join(sys.path)))
    assert all(code == 0 for code, _, _ in found), found
    return [json.loads(out) for _, out, _ in found]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.connected():
        jobs = json.loads(sys.argv[1])
        results = json.dumps([train(**job) if job else start_of_a_large_model() for job in jobs])
    sys.stdout.write(results)

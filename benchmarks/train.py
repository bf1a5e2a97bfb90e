"""Training speed side by side with transformers' GPT2LMHeadModel in a plain loop.

    python -m benchmarks.train                 CPU: configs/bench-gpt2-10m.yaml
    python -m benchmarks.train --device cuda   GPU: GPT-2 124M at T=1024 (about 5 minutes)

All contestants live in one process and take turns; the figures are medians over the rounds.
Beside every rate stands its share of the machine's own best large square matrix product in the same
round, counting 6N + 12 * n_layer * n_embd * T FLOPs per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gptsmith import settings
from gptsmith.model import size
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.pretrain import PretrainConfig
from gptsmith.train import compiling, precision
from gptsmith.train.loop import train_steps
from gptsmith.train.loss import Batch, next_token_loss
from gptsmith.train.optim import OptimConfig, Optimizer

RECIPE = Path(__file__).parents[1] / "configs" / "bench-gpt2-10m.yaml"


@dataclass
class Contestant:
    name: str
    step: Callable[[], object]
    first_seconds: float = 0.0  # compiling included
    rates: list[float] = field(default_factory=list)  # tokens/s of each round
    shares: list[float] = field(default_factory=list)  # of the matrix product's FLOP/s
    peak_mib: float = 0.0


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large square products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        sync(device)
        begin = time.perf_counter()
        a @ b
        sync(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(
    config: ModelConfig, optim: OptimConfig, batch: Batch, device: torch.device, compiled: bool
) -> Callable[[], object]:
    torch.manual_seed(0)
    model = GPTModel(config).to(device)
    loss = compiling.compiled(next_token_loss) if compiled else next_token_loss
    steps = train_steps(
        model,
        loss,
        lambda s: [batch],
        Optimizer(model, optim, device.type),
        learning_rate=lambda s: 1e-4,
        precision=precision.choose("auto", device),
        clip=1.0,
        seed=0,
    )
    return lambda: next(steps)


def theirs(
    config: ModelConfig, batch: Batch, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Callable[[], object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = batch.inputs.to(device)

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(ids, labels=ids).loss

    run = torch.compile(loss) if compiled else loss

    def step() -> float:
        value = run()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.train", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args(argv)
    device = precision.choose_device(arguments.device)
    if device.type == "cuda":
        config = ModelConfig.preset("gpt2", vocab_size=50304)
        optim, B, steps = OptimConfig(kind="adamw"), arguments.batch_size or 32, 10
    else:
        recipe = settings.load(
            PretrainConfig, [str(RECIPE), "--data", "-", "--out", "-"], prog="bench", description=""
        )
        config = recipe.model.change(vocab_size=4096)
        optim, B, steps = recipe.optim, arguments.batch_size or recipe.train.batch_size, 2
    T = config.context_length
    rows = torch.randint(0, config.vocab_size, (B, T + 1))
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    low = precision.choose("auto", device).dtype
    plain = theirs(config, batch, device, torch.float32, False)
    best = theirs(config, batch, device, low, True)
    contestants = [
        Contestant("transformers, fp32, eager", plain),
        Contestant("transformers, best: low precision, compiled", best),
        Contestant("gptsmith, eager", ours(config, optim, batch, device, False)),
        Contestant("gptsmith, compiled", ours(config, optim, batch, device, True)),
    ]
    for c in contestants:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        c.step()
        c.step()
        sync(device)
        c.first_seconds = time.perf_counter() - begin
        if device.type == "cuda":
            c.peak_mib = torch.cuda.max_memory_allocated() / 2**20
    flops = size.flops_per_token(config)
    gemms = []
    for _ in range(arguments.rounds):
        gemms.append(gemm_flops(device, low))
        for c in contestants:
            sync(device)
            begin = time.perf_counter()
            for _ in range(steps):
                c.step()
            sync(device)
            rate = steps * B * T / (time.perf_counter() - begin)
            c.rates.append(rate)
            c.shares.append(rate * flops / gemms[-1])
    base = statistics.median(contestants[0].rates)
    print(
        f"{size.parameters(config):,} parameters, T={T}, batch {B}, {flops / 1e6:.1f} MFLOP/token, "
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"matrix product {statistics.median(gemms) / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':46}{'tokens/s':>10}{'ratio':>8}{'share':>8}{'first 2 steps':>15}{'peak MiB':>10}")
    for c in contestants:
        rate, share = statistics.median(c.rates), statistics.median(c.shares)
        print(
            f"{c.name:46}{rate:10,.0f}{rate / base:8.2f}{share:8.0%}{c.first_seconds:13.1f} s"
            f"{c.peak_mib:10,.0f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(c) | {"step": None} for c in contestants]))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

"""(a), (e) Training speed side by side with transformers' GPT2LMHeadModel in a plain loop, and on a
GPU with nanoGPT.

    python -m benchmarks train                     CPU: configs/bench-gpt2-10m.yaml
    python -m benchmarks train --device cuda       GPU: GPT-2 124M at T=1024, under 8 minutes
    python -m benchmarks train --device cuda --only nanoGPT --only compiled --rounds 3

Each contestant has a process of its own, so that peak memory is measured separately; they
alternate, and the figures are medians over the rounds. Each rate comes with its share of the
machine's best large square matrix product in the same round, counting 6N + 12 * n_layer * n_embd *
T FLOPs per token, and, on a GPU whose peak is known, with its MFU. With --device cuda or --model
only torch and pydantic are needed; transformers is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks._machine import gemm_flops, peak_mib, sync

from gptsmith.batch import Batch
from gptsmith.model import flops
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import runtime
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig, TrainingPrecision
from gptsmith.train.step import train_steps

RECIPE = Path(__file__).parents[1] / "configs" / "bench-gpt2-10m.yaml"
ENOUGH = 390  # seconds after which no further round starts


@dataclass(frozen=True)
class Work:
    """What every contestant trains."""

    config: ModelConfig
    optim: OptimConfig
    B: int
    device: torch.device


@dataclass
class Contestant:
    name: str
    library: str
    low: bool  # in the fastest number format of the device, not fp32
    compiled: bool
    first_seconds: float = 0.0  # of two steps, compiling included
    rates: list[float] = field(default_factory=list)  # tokens/s of each round
    shares: list[float] = field(default_factory=list)  # of the matrix product's FLOP/s
    peak_mib: float = 0.0


def contestants() -> list[Contestant]:
    return [
        Contestant("transformers, fp32, eager", "transformers", False, False),
        Contestant("transformers, low precision, compiled", "transformers", True, True),
        Contestant("nanoGPT, low precision, compiled", "nanoGPT", True, True),
        Contestant("gptsmith, low precision, eager", "gptsmith", True, False),
        Contestant("gptsmith, low precision, compiled", "gptsmith", True, True),
        Contestant("gptsmith, fp8, compiled", "gptsmith", True, True),
    ]


def ours(who: Contestant, work: Work, batch: Batch) -> Callable[[], object]:
    precision: TrainingPrecision = "fp8" if "fp8" in who.name else "auto"
    model = GPTModel(work.config).to(work.device)
    if work.device.type == "cpu":
        runtime.keep_freed_memory()  # as every recipe does
    steps = train_steps(
        model,
        runtime.compiled(next_token_loss) if who.compiled else next_token_loss,
        lambda s: [batch],
        Optimizer(model, work.optim, work.device.type),
        learning_rate=lambda s: 1e-4,
        precision=runtime.choose_precision(precision, work.device),
        max_grad_norm=1.0,
        seed=0,
    )
    return lambda: next(steps)


def theirs(who: Contestant, work: Work, batch: Batch) -> Callable[[], object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    device, config = work.device, work.config
    options: dict[str, Any] = dict(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(GPT2Config(**options))
    model.to(device)
    model.loss_type = "ForCausalLM"  # what it takes anyway, but after a warning
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = batch.inputs.to(device)
    dtype = runtime.choose_precision("auto", device).dtype if who.low else torch.float32

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(ids, labels=ids).loss

    run = torch.compile(loss) if who.compiled else loss

    def step() -> float:
        value = run()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def nanogpt(who: Contestant, work: Work, batch: Batch) -> Callable[[], object]:
    from benchmarks._nanogpt import training_step

    dtype = runtime.choose_precision("auto", work.device).dtype
    on_device = batch.to(work.device)
    return training_step(work.config, on_device.inputs, on_device.targets, dtype)


def serve(parent: Connection, who: Contestant, work: Work) -> None:
    """A contestant's process: sends the seconds of its first two steps, then, for every number of
    steps that it gets, their seconds and its peak memory. Sends why, as text, if it cannot."""
    try:
        contest(parent, who, work)
    except ModuleNotFoundError as error:
        if error.name != who.library:
            raise
        parent.send(f"{who.library} is not installed")
    except Exception as error:  # out of memory: the others go on
        parent.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        raise


def contest(parent: Connection, who: Contestant, work: Work) -> None:
    torch.manual_seed(0)
    rows = torch.randint(0, work.config.vocab_size, (work.B, work.config.context_length + 1))
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    makers = {"gptsmith": ours, "transformers": theirs, "nanoGPT": nanogpt}
    step = makers[who.library](who, work, batch)

    def timed(steps: int) -> float:
        sync(work.device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        sync(work.device)
        return time.perf_counter() - begin

    parent.send(timed(2))
    while steps := parent.recv():
        if work.device.type == "cuda":
            timed(1)  # allocates again the memory that it had freed for the others
        parent.send((timed(steps), peak_mib(work.device)))
        if work.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    work: Work, everyone: list[Contestant], rounds: int, steps: int
) -> tuple[list[Contestant], float]:
    """The contestants that could run, with figures; the median FLOP/s of the matrix product."""
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # contestants share no state
    present: list[tuple[Contestant, Connection]] = []
    processes, gemms = [], []

    def answered(who: Contestant, pipe: Connection) -> Any:
        """What the contestant sends; None, after a line that says why, if it is out."""
        try:
            answer = pipe.recv()
        except EOFError:
            answer = "its process died"
        if isinstance(answer, str):
            print(f"{who.name}: left out, {answer}", flush=True)
            return None
        return answer

    for who in everyone:
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, who, work), daemon=True))
        processes[-1].start()
        there.close()  # so that recv ends if the process does
        if first := answered(who, here):
            who.first_seconds = first
            present.append((who, here))
            print(f"{who.name}: first two steps {first:.1f} s", flush=True)
    per_token = flops.flops_per_token(work.config)
    tokens = steps * work.B * work.config.context_length
    for number in range(rounds):
        if number and time.perf_counter() - began > ENOUGH:
            print(f"{number} rounds of {rounds}: out of time")
            break
        gemms.append(gemm_flops(work.device))
        for who, pipe in list(present):
            pipe.send(steps)
            answer = answered(who, pipe)
            if answer is None:
                present.remove((who, pipe))
                continue
            seconds, who.peak_mib = answer
            who.rates.append(tokens / seconds)
            who.shares.append(who.rates[-1] * per_token / gemms[-1])
    for _, pipe in present:
        pipe.send(0)
    for process in processes:
        process.join()
    return [who for who in everyone if who.rates], statistics.median(gemms)


def work_of(device: torch.device, name: str | None, B: int | None) -> Work:
    if device.type != "cuda" and name is None:
        from gptsmith.config import load_config
        from gptsmith.recipes.options import PretrainConfig

        argv = [str(RECIPE), "--data", "-", "--out", "-"]
        recipe = load_config(PretrainConfig, argv, prog="bench")
        config = recipe.model.change(vocab_size=4096)
        return Work(config, recipe.optim, B or recipe.train.batch_size, device)
    config = ModelConfig.preset(name or "gpt2", vocab_size=50304)
    return Work(config, OptimConfig(kind="adamw"), B or 32, device)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", help="a preset of GPT-2's shape (default on a GPU: gpt2)")
    parser.add_argument("--batch-size", type=int, help="rows of a step")
    parser.add_argument(
        "--precision", choices=["auto", "fp8"], default="auto", help="fp8: gptsmith in FP8 as well"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="in a round (default: 10 on a GPU, else 2)")
    parser.add_argument(
        "--eager", action="store_true", help="without torch.compile, which takes minutes"
    )
    parser.add_argument(
        "--only", action="append", help="contestants with this word in their names, repeatable"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    device = runtime.choose_device(options.device)
    try:
        runtime.choose_precision(options.precision, device)
    except ValueError as error:
        parser.error(str(error))
    work = work_of(device, options.model, options.batch_size)
    steps = options.steps or (10 if device.type == "cuda" else 2)
    everyone = [
        who
        for who in contestants()
        if not (options.eager and who.compiled)
        and (who.library != "nanoGPT" or device.type == "cuda")
        and ("fp8" not in who.name or options.precision == "fp8")
        and (not options.only or any(word in who.name for word in options.only))
    ]
    everyone, gemm = measure(work, everyone, options.rounds, steps)

    c, peak = work.config, runtime.peak_flops(device)
    per_token = flops.flops_per_token(c)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(
        f"{flops.parameters(c):,} parameters, T={c.context_length}, batch {work.B}, "
        f"{per_token / 1e6:.1f} MFLOP/token, {name}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {runtime.choose_precision('auto', device).name}; "
        f"matrix product {gemm / 1e9:,.0f} GFLOP/s"
        + (f" of the {peak / 1e9:,.0f} that the vendor states" if peak else "")
    )
    memory = "peak MiB" if device.type == "cuda" else "process MiB"
    heads = f"{'tokens/s':>10}{'ratio':>7}{'share':>7}{'MFU':>7}{'first 2 steps':>15}{memory:>13}"
    print(f"{'':40}{heads}")
    base = statistics.median(everyone[0].rates)
    for who in everyone:
        rate, share = statistics.median(who.rates), statistics.median(who.shares)
        mfu = f"{rate * per_token / peak:.1%}" if peak else "-"
        print(
            f"{who.name:40}{rate:10,.0f}{rate / base:7.2f}{share:7.0%}{mfu:>7}"
            f"{who.first_seconds:13.1f} s{who.peak_mib:13,.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps([vars(who) for who in everyone]))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

"""Tuning speed on real conversations: packed rows, padded rows, and plain pretraining windows.

    python -m benchmarks packing [--context 512] [--compile] [CHAT_FILE ...]

Every form trains a model of its own over the same conversations and counts real tokens per second;
they alternate, and the figures are medians over the rounds. The windows are cut from the same
tokens in one stream, each full and under the plain causal mask: the speed of pretraining, which
packing should keep.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.chat import load_chat
from gptsmith.data.conversations import read_conversations
from gptsmith.data.dataset import Windows
from gptsmith.data.options import ChatFiles
from gptsmith.data.packing import PackedRows, PaddedRows
from gptsmith.data.report import ReadReport
from gptsmith.model import flops
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.plan import Dataset
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import runtime
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.step import Step, train_steps

DATA = Path(os.environ.get("GPTSMITH_DATA", Path(__file__).parents[2] / "shared" / "data"))
SETS = ("chat_nanochat_identity", "chat_taskmaster4")  # long conversations, and short ones


@dataclass
class Contestant:
    name: str
    step: Callable[[], Step]
    share: float  # of positions that hold a real token
    rates: list[float] = field(default_factory=list)  # real tokens/s of each round


def trainer(
    config: ModelConfig, samples: Dataset, B: int, device: torch.device, compiled: bool
) -> Callable[[], Step]:
    torch.manual_seed(0)
    model = GPTModel(config).to(device)
    steps = train_steps(
        model,
        runtime.compiled(next_token_loss) if compiled else next_token_loss,
        lambda step: [samples.batch(step * B, B)],
        Optimizer(model, OptimConfig(), device.type),
        learning_rate=lambda step: 1e-4,
        precision=runtime.choose_precision("auto", device),
        max_grad_norm=1.0,
        seed=0,
    )
    return lambda: next(steps)


def measure(path: Path, arguments: argparse.Namespace) -> None:
    device = runtime.choose_device(arguments.device)
    T, B = arguments.context, arguments.batch_size
    files = ChatFiles(on_error="skip")
    read = read_conversations([path], files, ReadReport("skip"))
    texts = (m["content"] for c in read for m in c.messages)
    tokenizer = Tokenizer.train_bpe(texts, 4096).add_special_tokens(CHAT_TOKENS)
    template = ChatTemplate(TEMPLATE, tokenizer)
    examples, counts = load_chat([path], files, template, T)
    pad_id = tokenizer.special_tokens["<|pad|>"]
    packed = PackedRows(examples, T, 0, pad_id)
    padded = PaddedRows(examples, T, 0, pad_id, fixed=arguments.compile)
    stream = np.concatenate([example.ids for example in examples])
    windows = Windows([stream.astype(tokenizer.dtype)], T, 0, None)
    config = ModelConfig.preset("fast", context_length=T, vocab_size=tokenizer.vocab_size)
    contestants = [
        Contestant(
            name, trainer(config, samples, B, device, arguments.compile), _filled(samples, B)
        )
        for name, samples in (
            ("pretraining windows", windows),
            ("packed conversations", packed),
            ("padded conversations", padded),
        )
    ]
    for c in contestants:  # the first steps compile and fill caches
        c.step()
    for _ in range(arguments.rounds):
        for c in contestants:
            begin, tokens = time.perf_counter(), 0
            for _ in range(arguments.steps):
                tokens += c.step().tokens
            c.rates.append(tokens / (time.perf_counter() - begin))
    print(
        f"\n{path}: {counts}\n{examples.tokens:,} tokens, {examples.tokens / len(examples):,.0f} a "
        f"conversation; {flops.parameters(config):,} parameters, T={T}, batch {B}, {device}, "
        f"{'compiled' if arguments.compile else 'eager'}, torch {torch.__version__}"
    )
    print(f"{'':24}{'real tokens/s':>14}{'of pretraining':>16}{'of padded':>11}{'filled':>9}")
    first, *_, last = (statistics.median(c.rates) for c in contestants)
    for c in contestants:
        rate = statistics.median(c.rates)
        print(f"{c.name:24}{rate:14,.0f}{rate / first:16.2f}{rate / last:11.2f}{c.share:9.1%}")


def _filled(samples: Dataset, B: int) -> float:
    """Share of real tokens in an epoch's batches."""
    real = places = 0
    for first in range(0, samples.per_epoch, B):
        batch = samples.batch(first, B)
        places += batch.inputs.numel()
        real += batch.tokens
    return real / places


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks packing", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each contestant in a round")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args(argv)
    files = arguments.files or [DATA / name for name in SETS]
    if not arguments.files and not DATA.is_dir():
        print("no real conversations here: name chat files, or set GPTSMITH_DATA")
        return
    for path in files:
        measure(path, arguments)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

"""DPO: pairs per second of `finetune preference`'s step and of TRL's DPOTrainer, side by side.

    python -m benchmarks preference [--layers 4] [--width 256] [--context 256] [--lora 8]
        [--precision fp32] [--threads 1] [FILE]

Both train the same model (Llama's shape, the same weights) on the same token ids of the same pairs,
in steps of the same number of pairs with AdamW, in the precision that gptsmith chooses for this CPU
(bf16 where it multiplies it in hardware, which is TRL's default too). TRL, without its default of
gradient checkpointing, which costs time, runs twice: with log-probabilities of the reference that
are computed before, as ours are, and by default, with a second model in each step. They alternate;
figures are medians over the rounds, of wall-clock and of CPU seconds (with --threads 1 the latter
hold on a busy machine, too). First losses are shown: they differ by the order of the pairs alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks._trl import step_clock, tokenizer_of

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.pair_rows import PairRows
from gptsmith.data.pairs import Pairs, load_pairs
from gptsmith.interop.hf import open_folder
from gptsmith.model import lora, state_dict
from gptsmith.model.config import LoraConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import runtime
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.preference import PreferenceLoss, answer_log_probs
from gptsmith.train.step import train_steps

DATA = Path(os.environ.get("GPTSMITH_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = "instruction_data/instruction-data-with-preference.json"
BETA, RATE = 0.1, 1e-5


@dataclass
class Contestant:
    """steps(n) trains n steps and returns seconds, CPU seconds, and the first loss."""

    name: str
    steps: Callable[[int], tuple[float, float, float]]
    rates: list[tuple[float, float]] = field(default_factory=list)


def pairs_of(path: Path, T: int, limit: int) -> tuple[Pairs, Tokenizer]:
    text = path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.train_bpe([text], 4096).add_special_tokens(CHAT_TOKENS)
    template = ChatTemplate(TEMPLATE, tokenizer)
    pairs, counts = load_pairs([path], PreferenceFiles(on_error="skip"), template, T)
    print(f"{path.name}: {counts}")
    return pairs.take(range(min(limit, len(pairs)))), tokenizer


def timed(step: Callable[[], Any], n: int) -> tuple[float, float]:
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(n):
        step()
    return time.perf_counter() - begin, time.process_time() - cpu


def ours(model: GPTModel, pairs: Pairs, arguments: argparse.Namespace) -> Contestant:
    B, size = arguments.batch_size, arguments.pairs_per_step
    precision = runtime.choose_precision(arguments.precision, torch.device("cpu"))
    rows = PairRows(pairs, 0, 0, size, shared=True)
    with torch.no_grad(), precision.autocast():
        found = [(numbers, answer_log_probs(model, rows.of(numbers))) for numbers in rows.groups(B)]
    rows.reference = torch.zeros(len(pairs), 2)
    for numbers, log_p in found:
        rows.reference[torch.tensor(numbers)] = log_p.view(2, -1).T
    if arguments.lora:
        lora.attach(model, LoraConfig(rank=arguments.lora))
    steps = train_steps(
        model,
        PreferenceLoss("sigmoid", BETA),
        lambda step: [rows.batch(step * size + i, B) for i in range(0, size, B)],
        Optimizer(model, OptimConfig(kind="adamw", learning_rate=RATE), "cpu"),
        learning_rate=lambda step: RATE,
        precision=precision,
        max_grad_norm=1.0,
        seed=0,
    )

    def run(n: int) -> tuple[float, float, float]:
        losses: list[float] = []
        seconds = timed(lambda: losses.append(next(steps).loss), n)
        return *seconds, losses[0]

    return Contestant("gptsmith", run)


def theirs(
    folder: Path, pairs: Pairs, arguments: argparse.Namespace, precomputed: bool
) -> Contestant:
    import datasets
    import transformers
    import trl

    rows = []
    for i in range(len(pairs)):
        chosen, rejected = pairs.examples[2 * i], pairs.examples[2 * i + 1]
        start = int(np.argmax(chosen.labels != IGNORE_INDEX))
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        ids = (chosen.ids[:start], chosen.ids[start:], rejected.ids[start:])
        rows.append({name: x.tolist() for name, x in zip(names, ids, strict=True)})

    class Tokenized(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    clock, words = step_clock(), tokenizer_of(folder)

    def run(n: int) -> tuple[float, float, float]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        adapters: dict[str, Any] = {}
        if arguments.lora:
            import peft

            adapters["peft_config"] = peft.LoraConfig(
                r=arguments.lora, lora_alpha=arguments.lora, target_modules="all-linear"
            )
        accumulation = arguments.pairs_per_step // arguments.batch_size
        trainer = Tokenized(
            model, None, processing_class=words, train_dataset=datasets.Dataset.from_list(rows),
            args=trl.DPOConfig(
                str(folder / "trainer"), beta=BETA, learning_rate=RATE, max_steps=n + 1,
                per_device_train_batch_size=arguments.batch_size,
                gradient_accumulation_steps=accumulation, precompute_ref_log_probs=precomputed,
                report_to=[], use_cpu=True, bf16=arguments.precision == "bf16",
                gradient_checkpointing=False, save_strategy="no", logging_steps=1,
                disable_tqdm=True, dataloader_num_workers=0, max_length=None,
                lr_scheduler_type="constant",
            ),
            callbacks=[clock], **adapters,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return *clock.seconds(), trainer.state.log_history[0]["loss"]

    return Contestant(f"TRL, reference {'before' if precomputed else 'in each step'}", run)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks preference", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=DATA / PAIRS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of a micro-batch")
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args(argv)
    if not arguments.file.is_file():
        print("no preferences here: name a file of pairs, or set GPTSMITH_DATA")
        return
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        import datasets
        import transformers
        import trl
    except ImportError as error:
        print(f"{error.name} is not installed: pip install -e '.[dev]'")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    arguments.precision = runtime.choose_precision(arguments.precision, device).name
    runtime.keep_freed_memory()  # as every command that trains
    limit = 8 * arguments.pairs_per_step
    pairs, tokenizer = pairs_of(arguments.file, arguments.context, limit)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=arguments.layers, hidden_size=arguments.width,
                intermediate_size=round(arguments.width * 8 / 3 / 64) * 64,
                num_attention_heads=arguments.width // 64, vocab_size=tokenizer.vocab_size,
                max_position_embeddings=arguments.context + 1, tie_word_embeddings=True,
            )
        ).save_pretrained(folder)  # fmt: skip
        tokenizer.save(folder / "tokenizer.json")
        found = open_folder(folder)
        model = state_dict.load(found.config, dict(found.tensors()), "benchmark").float()
        contestants = [
            ours(model, pairs, arguments),
            *(theirs(folder, pairs, arguments, precomputed) for precomputed in (True, False)),
        ]
        firsts: dict[str, float] = {}
        for number in range(arguments.rounds + 1):  # the first one fills caches
            for c in contestants:
                wall, cpu, first = c.steps(arguments.steps if number else 1)
                firsts.setdefault(c.name, first)
                count = arguments.steps * arguments.pairs_per_step
                if number:
                    c.rates.append((count / wall, count / cpu))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pairs):,} pairs of "
        f"{pairs.tokens / len(pairs) / 2:.0f} tokens a side, {arguments.pairs_per_step} in a step, "
        f"{torch.get_num_threads()} threads, {arguments.precision}, torch {torch.__version__}, "
        f"trl {trl.__version__}"
    )
    print(f"{'':32}{'pairs/s':>10}{'pairs/CPU s':>13}{'of TRL':>9}{'first loss':>12}")
    medians = [tuple(map(statistics.median, zip(*c.rates, strict=True))) for c in contestants]
    for c, (wall, cpu) in zip(contestants, medians, strict=True):
        share = cpu / medians[1][1]
        print(f"{c.name:32}{wall:10.2f}{cpu:13.2f}{share:9.2f}{firsts[c.name]:12.4f}")
    print(json.dumps({c.name: m for c, m in zip(contestants, medians, strict=True)}))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

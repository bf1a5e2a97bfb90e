"""GRPO: completions per second of `finetune reward` and of TRL's GRPOTrainer, side by side.

    python -m benchmarks reward [--layers 4] [--width 256] [--prompts 8] [--group 8]
        [--prompt-words 100] [--new-tokens 32] [--precision fp32] [--threads 1]

Both practise on the same prompts with the same model (Llama's shape, the same weights), at
temperature 1, in the precision that gptsmith chooses for this CPU (bf16 where it multiplies it in
hardware, which is TRL's default too), with AdamW and a reward that differs among all completions,
so that none is left out. Every completion has the same length, as random weights never end one. A
step is sampling, reward and update. They alternate; figures are medians over the rounds, of
wall-clock and of CPU seconds (with --threads 1 the latter hold on a busy machine, too). TRL
generates with transformers, since vLLM would be another process, and without its default of
gradient checkpointing, which costs time.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from benchmarks._trl import step_clock, tokenizer_of

from gptsmith.data.prompts import EncodedPrompt, Prompt
from gptsmith.evaluate.rewards import Sample
from gptsmith.interop.hf import open_folder
from gptsmith.model import state_dict
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.policy import Policy
from gptsmith.recipes.reward import log_probs_by, sampling_weights
from gptsmith.recipes.reward_options import RewardConfig
from gptsmith.recipes.rollouts import Rollouts, RolloutSampler
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import runtime
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.policy_loss import PolicyLoss
from gptsmith.train.step import train_steps

RATE = 1e-5
QUESTION = "Question {}: how many letters does the word {} have, and which of them occur twice?"
WORDS = ("the", "a", "of", "river", "house", "green", "seven", "people", "many", "long", "small")


@dataclass
class Contestant:
    """steps(n) does n steps and returns seconds and CPU seconds; `share`: of sampling."""

    name: str
    steps: Callable[[int], tuple[float, float]]
    rates: list[tuple[float, float]] = field(default_factory=list)
    share: float | None = None


def reward(text: str) -> float:
    """Different for nearly all texts."""
    return sum(map(ord, text)) % 1009 / 1009


def texts(count: int, words: int) -> list[str]:
    """Questions, each behind as many random words."""
    random = Random(0)
    found = []
    for i in range(count):
        question = QUESTION.format(i, "abcdefghij"[i % 10 :] + str(i))
        found.append(" ".join([*random.choices(WORDS, k=words), question]))
    return found


def ours(model: GPTModel, tokenizer: Tokenizer, arguments: argparse.Namespace) -> Contestant:
    P, G, new = arguments.prompts, arguments.group, arguments.new_tokens
    device = torch.device("cpu")
    precision = runtime.choose_precision(arguments.precision, device)
    config = RewardConfig(
        **{"from": "base", "out": "out"}, data=["texts"], prompts_per_step=P, group_size=G,
        max_new_tokens=new, train={"batch_size": P * G},
    )  # fmt: skip
    prompts = [
        EncodedPrompt(
            Prompt([{"role": "user", "content": text}], None, {}, text), tokenizer.prompt(text)
        )
        for text in texts(16 * P, arguments.prompt_words)
    ]
    T = max(len(prompt.ids) for prompt in prompts) + new
    rollouts = Rollouts(config, prompts, T, 0)

    def rewards(samples: Sequence[Sample]) -> list[float]:
        return [reward(sample.text) for sample in samples]

    eos_ids, weights = tokenizer.special_ids.eos_ids, sampling_weights(precision)
    policy = Policy(model, tokenizer, eos_ids, T, weights)
    rollouts.attach(RolloutSampler(policy, {"sum": rewards}, [1.0]), log_probs_by(precision, 1.0))
    steps = train_steps(
        model, PolicyLoss(), rollouts.micro_batches,
        Optimizer(model, OptimConfig(kind="adamw", learning_rate=RATE), "cpu"),
        learning_rate=lambda step: RATE, precision=precision, max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    next(steps)
    contestant = Contestant("gptsmith", lambda n: (0.0, 0.0))

    def run(n: int) -> tuple[float, float]:
        begin, cpu, shares = time.perf_counter(), time.process_time(), []
        for _ in range(n):
            next(steps)
            shares.append(rollouts.metrics()["sampling_share"])
        contestant.share = statistics.median(shares)
        return time.perf_counter() - begin, time.process_time() - cpu

    contestant.steps = run
    return contestant


def theirs(folder: Path, arguments: argparse.Namespace) -> Contestant:
    import datasets
    import transformers
    import trl

    P, G = arguments.prompts, arguments.group

    clock, words = step_clock(), tokenizer_of(folder)
    questions = texts(16 * P, arguments.prompt_words)

    def rewards(completions: list[str], **_: Any) -> list[float | None]:
        return [reward(text) for text in completions]

    def run(n: int) -> tuple[float, float]:
        trainer = trl.GRPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(folder), rewards,
            train_dataset=datasets.Dataset.from_list([{"prompt": t} for t in questions]),
            processing_class=words, callbacks=[clock],
            args=trl.GRPOConfig(
                str(folder / "trainer"), learning_rate=RATE, max_steps=n + 1, num_generations=G,
                per_device_train_batch_size=P * G, max_completion_length=arguments.new_tokens,
                temperature=1.0, beta=0.0, report_to=[], use_cpu=True,
                bf16=arguments.precision == "bf16", gradient_checkpointing=False,
                save_strategy="no", logging_steps=1, disable_tqdm=True,
                lr_scheduler_type="constant",
            ),
        )  # fmt: skip
        trainer.train()
        wall, cpu = clock.seconds()
        return wall, cpu

    return Contestant("TRL", run)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks reward", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt-words", type=int, default=0, help="of a text before the question")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args(argv)
    try:
        import transformers
        import trl
    except ImportError as error:
        print(f"{error.name} is not installed: pip install -e '.[dev]'")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    arguments.precision = runtime.choose_precision(arguments.precision, device).name
    runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Tokenizer.train_bpe(texts(200, arguments.prompt_words), 1024)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=arguments.width,
            intermediate_size=4 * arguments.width, num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.width // 64,
            max_position_embeddings=256 + 2 * arguments.prompt_words,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
        found = open_folder(folder)
        model = state_dict.load(found.config, dict(found.tensors()), "imported").train()
        contestants = [ours(model, tokenizer, arguments), theirs(folder, arguments)]
        for _ in range(arguments.rounds):
            for who in contestants:
                wall, cpu = who.steps(arguments.steps)
                count = arguments.steps * arguments.prompts * arguments.group
                who.rates.append((count / wall, count / cpu))
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size:,} parameters, {arguments.prompts} prompts x {arguments.group} completions of "
        f"{arguments.new_tokens} tokens, {arguments.precision}, {torch.get_num_threads()} threads, "
        f"TRL {trl.__version__}, transformers {transformers.__version__}"
    )
    medians = [
        [statistics.median(rate) for rate in zip(*who.rates, strict=True)] for who in contestants
    ]
    for who, (wall, cpu) in zip(contestants, medians, strict=True):
        share = "" if who.share is None else f", {who.share:.0%} of the step sampling"
        print(f"{who.name:<10} {wall:8.1f} completions/s, {cpu:8.1f} per CPU second{share}")
    (wall, cpu), (other_wall, other_cpu) = medians
    print(f"{wall / other_wall:.1f} times as many, {cpu / other_cpu:.1f} by CPU time")

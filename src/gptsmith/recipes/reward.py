"""Reinforcement learning: the model completes prompts, and completions with more reward than others
of the same prompt become more likely (GRPO, Shao et al. 2024, and its simple relatives)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from gptsmith.batch import PolicyBatch
from gptsmith.chat_template.template import ChatTemplate, Message
from gptsmith.data.prompts import (
    EncodedPrompt,
    encode_prompts,
    fingerprint,
    held_out_skill_prompts,
    read_prompts,
    skill_prompts,
    split_prompts,
)
from gptsmith.data.report import ReadReport
from gptsmith.data.skills import SKILLS
from gptsmith.evaluate.rewards import RewardUnavailableError, code_digest, compares, load_reward
from gptsmith.generate.chat import reply_stop_ids
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import finetune, in_loop_eval, loop
from gptsmith.recipes.job import TrainingJob
from gptsmith.recipes.plan import Note
from gptsmith.recipes.policy import Policy
from gptsmith.recipes.reward_options import RewardConfig
from gptsmith.recipes.rollouts import LogProbs, Rollouts, RolloutSampler, Scored
from gptsmith.run import Run, digests
from gptsmith.run.layout import REFERENCE
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint, distributed
from gptsmith.train.loss import token_log_probs
from gptsmith.train.monitor import read_events
from gptsmith.train.policy_loss import PolicyLoss
from gptsmith.train.runtime import Precision, Runtime, evaluating

VERDICTS = "verdicts"  # folder in that of the run
_VAL_SEED = 0x7A1  # not that of `evaluate`, with which short words and pairs of numbers are shared


def reward(config: RewardConfig, started: float | None = None) -> int:
    """`gptsmith finetune reward`; returns the exit code, 0 or loop.STOPPED."""
    base = finetune.base_run(config)
    needs_copy = config.kl and not config.lora.rank
    if needs_copy and config.resume and not (config.out / REFERENCE).is_file():
        raise ValueError(
            f"kl {config.kl}: {config.out} does not have the model before training, which is kept "
            "only if a run begins with kl above 0: resume with --kl 0, or start another run"
        )
    rewards = {
        name: load_reward(
            name, trust_code=config.trust_code, judge=config.judge, cache=config.out / VERDICTS
        )
        for name in config.reward
    }
    prepared = finetune.prepare(config, base)
    model, tokenizer = prepared.model, prepared.tokenizer
    context = finetune.row_length(config.context_length, prepared)
    template = None if base.template is None else ChatTemplate(base.template, tokenizer)
    train, val, notes = load(config, template, tokenizer, context - config.max_new_tokens)
    T = max(len(ids) for _, ids in train) + config.max_new_tokens - 1
    rollouts = Rollouts(config, train, T, prepared.pad_id)
    size = ["prompts_per_step", "group_size"]
    config = finetune.with_samples_per_step(config, size, T, len(train))
    resolved = finetune.resolve(config, prepared, rollouts)
    config, runtime = resolved.config, resolved.runtime
    stop_ids = reply_stop_ids(template) if template else tokenizer.special_ids.eos_ids
    policy = Policy(model, tokenizer, stop_ids, T, sampling_weights(runtime.precision))
    sampler = RolloutSampler(policy, rewards, config.reward_weights or [1.0] * len(rewards))
    greedy = SamplingConfig(temperature=0, max_new_tokens=config.max_new_tokens)
    shown: Scored | None = None

    def evaluate(limit: int | None) -> Mapping[str, float | int | None]:
        nonlocal shown
        policy.refresh()
        shown = sampler(val, greedy, [[0]] * len(val))
        means = sampler.means(shown.rewards)
        lengths = [len(completion.ids) for completion in shown.completions]
        return {f"val_{name}": value for name, value in means.items()} | {
            "val_length": float(np.mean(lengths))
        }

    def samples() -> Iterator[tuple[str, str]]:
        """The best and the worst of the newest rollout; before the first, of validation."""
        found = rollouts.rollout or shown
        assert found is not None
        total = sampler.total(found.rewards)
        for name, row in (("best", int(total.argmax())), ("worst", int(total.argmin()))):
            prompt = found.prompts[row * len(found.prompts) // len(total)]
            text = found.completions[row].text
            yield tokenizer.decode(prompt.ids), f"{text}\n[{name}: reward {total[row]:.4g}]"

    evaluate_tasks, task_notes = in_loop_eval.prepare(config.eval, model, tokenizer)
    data = fingerprint(train) + fingerprint(val) + code_digest(config.reward)
    run = finetune.create_run(
        resolved, prepared, template=base.template,
        corpus=sha256(data.encode()).hexdigest(), fixed=_FIXED,
    )  # fmt: skip
    try:
        reference = reference_model(config, runtime, run, policy)
    except BaseException:
        run.close()
        raise
    log_probs = log_probs_by(runtime.precision, config.temperature)
    rollouts.attach(sampler, log_probs, reference)
    loss = PolicyLoss(config.clip_low, config.clip_high, config.kl, config.temperature)
    job = TrainingJob(
        model, loss, rollouts, evaluate, 0, samples, evaluate_tasks,
        objective="reward", remedy=lambda: remedy(run),
        curves=("entropy", *(("kl",) if config.kl else ()), "length"),
        batches=rollouts.micro_batches, metrics=rollouts.metrics,
        state=rollouts.state, load_state=rollouts.load_state,
    )  # fmt: skip
    try:
        return loop.train(run, job, resolved.with_notes([*notes, *task_notes]), started)
    except RewardUnavailableError as error:
        if checkpoint.steps(run.checkpoints):
            raise ValueError(f"{error}; --resume continues") from None
        raise


_FIXED = (
    "context_length", "reward", "reward_weights", "prompts_per_step", "group_size",
    "max_new_tokens", "temperature", "updates",
)  # fmt: skip


def load(
    config: RewardConfig, template: ChatTemplate | None, tokenizer: Tokenizer, limit: int
) -> tuple[list[EncodedPrompt], list[EncodedPrompt], list[Note]]:
    """Prompts of at most `limit` tokens to practise on, those of validation, and notes on them."""
    if limit < 1:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in a "
            f"context of {limit + config.max_new_tokens} tokens"
        )

    def encode(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        if template is not None:
            return template.prompt(messages, tools=tools)
        if len(messages) > 1 or tools:
            raise ValueError("a conversation needs a chat model: fine-tune one with finetune chat")
        return tokenizer.prompt(messages[0]["content"])

    report = ReadReport(config.on_error)
    needs_answer = any(map(compares, config.reward))
    built_in = finetune.uses_built_in(config)
    if built_in:
        if template is None:
            raise ValueError(
                f"--data skills has questions for a chat model: make one first, gptsmith "
                f"finetune chat --from {config.base} --data skills"
            )
        found = skill_prompts(config.train.seed, config.questions)
    else:
        found = list(read_prompts(config.data, config, report, needs_answer))
    if config.val:
        val = list(read_prompts(config.val, config, report, needs_answer))
    elif built_in:
        val = held_out_skill_prompts(_VAL_SEED, -(-config.val_prompts // len(SKILLS)))
    else:
        try:
            found, val = split_prompts(
                found, config.val_fraction, config.train.seed, config.val_prompts
            )
        except ValueError as error:
            why = "; ".join([*report.lines(), str(error)])
            raise ValueError(f"{' '.join(config.data)}: {why}") from None
    of = f" of {len(val):,}" if len(val) > config.val_prompts else ""
    val = val[:: max(1, len(val) // config.val_prompts)][: config.val_prompts]
    encoded, encoded_val = (encode_prompts(part, encode, limit, report) for part in (found, val))
    if not encoded or not encoded_val:
        skipped = "; ".join(report.skipped.lines()) or "there are no rows"
        raise ValueError(f"{' '.join(config.data)}: no prompts left: {skipped}")
    sizes = (
        f"{len(encoded):,} prompts of up to {max(len(ids) for _, ids in encoded):,} tokens; "
        f"{len(encoded_val):,}{of} for validation"
    )
    texts = [*report.hints, *report.lines(), sizes]
    return encoded, encoded_val, [Note("data", text) for text in texts]


def remedy(run: Run) -> str:
    """What to do about a run that no evaluation found better than its base."""
    try:
        steps = [event for event in read_events(run.metrics) if event["event"] == "train"]
    except ValueError:  # a damaged record, which the report names
        steps = []
    if not steps or any(event["train_no_signal"] < 1 for event in steps):
        return "check the learning rate and the data"
    if any(event["train_reward"] for event in steps):
        return (
            "the completions of each prompt had equal rewards, so there was nothing to learn from: "
            "choose a reward that tells them apart"
        )
    return (
        "no completion got a reward, so there was nothing to learn from: tune on answers first, "
        "gptsmith finetune chat, or choose a reward that is easier to get"
    )


def sampling_weights(precision: Precision) -> str:
    """The format of the weights for sampling: in the precision of training, which is as near to the
    policy that is trained, and nearly twice as fast."""
    return "bfloat16" if precision.name == "bf16" else "auto"


def log_probs_by(precision: Precision, temperature: float) -> LogProbs:
    """Log-probabilities as PolicyLoss computes them, without gradients."""

    def log_probs(model: GPTModel, batch: PolicyBatch) -> Tensor:
        with evaluating(model, precision):
            on_device = batch.to(model.head_weight.device)
            return token_log_probs(model, on_device, temperature=temperature).cpu()

    return log_probs


def reference_model(
    config: RewardConfig, runtime: Runtime, run: Run, policy: Policy
) -> Callable[[], GPTModel] | None:
    """The model before training, for the KL penalty; None without one.

    With LoRA it is the model without its adapters. Otherwise it is a copy, of which the run keeps
    the weights, since a resumed run has others.
    """
    if not config.kl:
        return None
    if config.lora.rank:
        return policy.without_adapters
    copy = deepcopy(policy.model).requires_grad_(False).to(runtime.device)
    if config.resume:
        weights = checkpoint.load_tensors(run.verified(REFERENCE))
        copy.load_state_dict(weights)
    elif distributed.rank() == 0:
        with digests.recorded(run.path, REFERENCE) as temporary:
            checkpoint.save_tensors(temporary, copy.state_dict())
    distributed.barrier()
    return lambda: copy

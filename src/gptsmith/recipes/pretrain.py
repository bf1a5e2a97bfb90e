"""Pretraining: a corpus and an architecture in, a run folder out. The loop is in `pretrain`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import Field

from gptsmith import settings
from gptsmith.data.batches import Windows, validation_batches
from gptsmith.data.shards import Corpus
from gptsmith.evaluate.perplexity import evaluate
from gptsmith.generate.engine import generate_text
from gptsmith.generate.sample import SamplingConfig
from gptsmith.model import size
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.leakage import first_scored
from gptsmith.recipes import state
from gptsmith.recipes.options import EvalConfig, MonitorConfig, SaveConfig, Section, TrainConfig
from gptsmith.recipes.report import write_report
from gptsmith.run import Run
from gptsmith.train import compiling, precision
from gptsmith.train.distributed import rank, world_size
from gptsmith.train.loop import Guard, train_steps
from gptsmith.train.loss import Batch, next_token_loss, score_from
from gptsmith.train.monitor import Monitor, command_start
from gptsmith.train.optim import OptimConfig, Optimizer
from gptsmith.train.schedule import multiplier

STOPPED = 75  # exit code: stopped by a signal after saving (EX_TEMPFAIL: try again)


# What a resumed run must leave as it was, to go on with the same samples and optimizer state.
FIXED = (
    "document_mask", "pad_vocab", "optim.kind", "train.seed", "train.batch_size",
    "train.tokens_per_step", "train.precision",
)  # fmt: skip


class PretrainConfig(Section):
    """Train a model from scratch on a prepared corpus."""

    data: Path
    """Corpus made by `gptsmith prepare`."""
    out: Path
    """Run folder to write."""
    resume: bool = False
    """Go on from the newest good checkpoint of the run folder."""
    document_mask: bool = False
    """A token attends to its own document only."""
    pad_vocab: int = Field(1, ge=1)
    """Round the model's vocabulary up to a multiple of this (64 is faster on GPUs)."""
    model: ModelConfig = ModelConfig.preset("fast")
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    monitor: MonitorConfig = MonitorConfig()


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith pretrain [RECIPE.yaml] --data CORPUS --out RUN [--section.field VALUE]`.

    started: see `pretrain`; default the start of the command.
    """
    config = settings.load(
        PretrainConfig,
        Run.with_stored_recipe(argv),
        prog="gptsmith pretrain",
        description="Train a model from scratch on a prepared corpus.",
    )
    return pretrain(config, command_start() if started is None else started)


@dataclass(frozen=True)
class Horizon:
    """Where the run ends: at `steps`, or at `seconds` on the clock."""

    steps: int | None
    seconds: float | None

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is behind us."""
        return step / self.steps if self.steps else seconds / (self.seconds or 1)


def pretrain(config: PretrainConfig, started: float | None = None) -> int:
    """Train as the config says; returns the exit code, 0 or STOPPED.

    started: time.perf_counter() from which `seconds` counts. Raises ValueError for a corpus or a
    configuration that cannot be trained, before anything is written.
    """
    corpus = Corpus.open(config.data)
    config, plan, notes = resolve(config, corpus)
    train, T = config.train, config.model.context_length
    device = torch.device(train.device)
    arithmetic = precision.choose(train.precision, device)
    eos = corpus.tokenizer.eos_id if config.document_mask else None
    windows = Windows(corpus.train, T, train.seed, eos)
    torch.manual_seed(train.seed)
    mask_folder = config.out if config.resume else Path()  # a run keeps a copy of a mask's file
    model = GPTModel(config.model, mask_folder=mask_folder, trust_code=True).to(device)
    model.recompute_activations = train.recompute_activations
    start = first_scored(model.mask, T, config.model.n_head, config.model.n_layer)
    optimizer = Optimizer(model, config.optim, device.type)
    fp16 = arithmetic.name == "fp16"
    now = state.Progress(
        Guard(train.spike_sigmas, train.max_skips),
        torch.amp.GradScaler(device.type) if fp16 else None,
    )
    run = Run.create(
        config.out, config.model_dump(mode="json"), config.model, corpus.tokenizer, config.resume,
        corpus=corpus.fingerprint, fixed=FIXED,
    )  # fmt: skip
    with run, state.StopSignal() as stop:
        if config.resume:
            notes += resume(run, now, model, optimizer, windows, config)
        with Monitor(
            run.path,
            total_steps=plan.steps,
            config=config.model_dump(mode="json"),
            trackers=config.monitor.trackers,
            resume=(now.step, now.seconds) if config.resume else None,
            started=started,
        ) as monitor:
            for note in notes:
                monitor.log(now.step, "note", message=note)
            save = partial(save_checkpoint, run, now, model, optimizer, windows, config, monitor)

            def epoch() -> float:
                return round(now.step * per_step / windows.per_epoch, 4)

            def assess(limit: int | None) -> float:
                """Measure on `limit` validation tokens, sample, draw; returns the loss."""
                batches = validation_batches(corpus.val, T, 2 * train.batch_size, eos, limit)
                scored = (score_from(batch, start) for batch in batches)
                scores = evaluate(model, scored, arithmetic, token_bytes)
                monitor.log(now.step, "val", epoch=epoch(), **scores.fields())
                if config.eval.sample_tokens:
                    monitor.text(now.step, config.eval.prompt, sample(model, corpus, config))
                monitor.draw()
                return scores.loss

            # The best is judged on the same text each time; the end is measured on all of it.
            limit = config.eval.tokens
            if limit is not None and limit >= corpus.val_tokens:
                limit = None
            per_step = sequences_per_step(config)
            token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())
            if not config.resume:
                if config.eval.every:
                    now.improves(assess(limit))
                save()
            mark, marked = monitor.seconds, now.tokens
            complete = plan.done(now.step, now.seconds) >= 1 or stops_early(config, now)
            compiled = train.compile == "on"
            steps = train_steps(
                model,
                compiling.compiled(next_token_loss) if compiled else next_token_loss,
                lambda s: [
                    score_from(b, start)
                    for b in micro_batches(windows, s * per_step, per_step, train.batch_size)
                ],
                optimizer,
                learning_rate=lambda s: learning_rate(config, s, plan.done(s, monitor.seconds)),
                precision=arithmetic,
                clip=config.optim.clip,
                seed=train.seed,
                first_step=now.step,
                guard=now.guard,
                scaler=now.scaler,
            )
            for step in () if complete else steps:
                now.step, now.seconds = step.step, monitor.seconds
                now.tokens += step.tokens
                done = plan.done(now.step, now.seconds) >= 1
                if step.skipped:
                    monitor.log(now.step, "note", message=step.skipped)
                if now.step % config.monitor.log_every == 0 or done:
                    speed = (now.tokens - marked) / max(1e-9, now.seconds - mark)
                    mark, marked = now.seconds, now.tokens
                    monitor.log(
                        now.step, "train", epoch=epoch(), train_loss=step.loss,
                        learning_rate=step.learning_rate, grad_norm=step.grad_norm,
                        tokens=now.tokens, tokens_per_second=round(speed, 1),
                    )  # fmt: skip
                    mfu = precision.mfu(speed * size.flops_per_token(config.model), device)
                    monitor.progress(now.step, loss=step.loss, tokens_per_second=speed, mfu=mfu)
                if done or (config.eval.every and now.step % config.eval.every == 0):
                    before = monitor.seconds
                    last = done and not config.eval.every  # then there is nothing to compare with
                    best = now.improves(assess(None if last else limit))
                    enough = stops_early(config, now)
                    if (done or enough) and limit is not None and not last:
                        assess(None)
                    if enough:
                        message = f"stopped early: best was step {now.best_step}"
                        monitor.log(now.step, "note", message=message)
                    if best or done or enough:
                        save()
                    if done or enough:
                        break
                    mark += monitor.seconds - before  # evaluation is not training time
                if stop.received:
                    save()
                    monitor.say(f"{stop.received}: saved at step {now.step}; --resume goes on")
                    return STOPPED
                every = config.save.every
                overdue = time.perf_counter() - now.saved_at > config.save.seconds
                if overdue or (every and now.step % every == 0):
                    save()
        run.finish("best" if config.eval.patience else "last")
        write_report(run)
    return 0


def resolve(config: PretrainConfig, corpus: Corpus) -> tuple[PretrainConfig, Horizon, list[str]]:
    """Fill in what depends on the machine and the corpus, once: a resumed run reuses the answers.

    Returns the complete configuration, where the run ends, and why each choice was made.
    """
    train = config.train
    vocab = -(-corpus.tokenizer.vocab_size // config.pad_vocab) * config.pad_vocab
    model = config.model.change(vocab_size=vocab)
    T = model.context_length
    device = precision.choose_device(train.device)
    if train.threads:
        torch.set_num_threads(train.threads)
    arithmetic = precision.choose(train.precision, device)
    if train.tokens_per_step and train.tokens_per_step % (train.batch_size * T * world_size()):
        raise ValueError(
            f"train.tokens_per_step {train.tokens_per_step} is not a multiple of batch_size x "
            f"context_length x processes = {train.batch_size * T * world_size()}"
        )
    per_step = sequences_per_step(config)
    per_epoch = Windows(corpus.train, T, train.seed, None).per_epoch
    sequences = (train.epochs or 1) * per_epoch
    if train.tokens:
        sequences = train.tokens / T
    steps = train.steps or max(1, round(sequences / per_step))
    plan = Horizon(None if train.seconds else steps, train.seconds)
    flops = size.flops_per_token(model) * steps * per_step * T
    compiled, why = compiling.decide(train.compile, device, flops, train.seconds)
    memory = size.training_memory(model, train.batch_size, T, config.optim.kind)
    there = precision.memory_bytes(device)
    if there and memory.total > 1.5 * there:  # the formula is for fp32, and within a quarter
        raise ValueError(
            f"model and train.batch_size {train.batch_size} want about {memory.total / 2**30:,.0f} "
            f"GiB, {device} has {there / 2**30:,.0f}: take a smaller batch_size (tokens_per_step "
            "keeps the step as large), model or context"
        )
    mask = "" if model.mask == "causal()" else f", mask {model.mask}"
    notes = [
        f"model: {size.parameters(model):,} parameters, context {T}, vocabulary {vocab}{mask}; "
        f"about {memory.total / 2**20:,.0f} MiB to train",
        f"data: {corpus.train_tokens:,} training tokens, {corpus.val_tokens:,} for validation",
        f"{f'{steps:,} steps' if plan.steps else f'{train.seconds:,.0f} s'} of {per_step * T:,} "
        f"tokens on {device} with {torch.get_num_threads()} threads",
        f"precision {arithmetic.name}: {arithmetic.reason}",
        f"torch.compile {'on' if compiled else 'off'}: {why}",
    ]
    train = train.model_copy(
        update=dict(
            device=str(device),
            precision=arithmetic.name,
            compile="on" if compiled else "off",
            threads=torch.get_num_threads(),
        )
    )
    return config.model_copy(update=dict(model=model, train=train)), plan, notes


def stops_early(config: PretrainConfig, now: state.Progress) -> bool:
    return 0 < config.eval.patience <= now.evals_since_best


def sequences_per_step(config: PretrainConfig) -> int:
    """Windows that one optimizer step reads, over all ranks."""
    train = config.train
    return (train.tokens_per_step or train.batch_size * config.model.context_length) // (
        config.model.context_length
    )


def micro_batches(windows: Windows, first: int, count: int, size: int) -> list[Batch]:
    """This rank's share of samples first..first+count-1, in micro-batches of `size`."""
    mine = count // world_size()
    first += rank() * mine
    return [windows.batch(i, min(size, first + mine - i)) for i in range(first, first + mine, size)]


def learning_rate(config: PretrainConfig, step: int, done: float) -> float:
    optim = config.optim
    return optim.learning_rate * multiplier(
        optim.schedule,
        step,
        done,
        warmup_steps=optim.warmup_steps,
        final=optim.final_rate,
        decay_fraction=optim.decay_fraction,
    )


def sample(model: GPTModel, corpus: Corpus, config: PretrainConfig) -> str:
    """One continuation of the prompt, the same random stream each time."""
    sampling = SamplingConfig(max_new_tokens=config.eval.sample_tokens)
    return generate_text(model, corpus.tokenizer, [config.eval.prompt], sampling)[0]


def save_checkpoint(
    run: Run,
    now: state.Progress,
    model: GPTModel,
    optimizer: Optimizer,
    windows: Windows,
    config: PretrainConfig,
    monitor: Monitor,
) -> None:
    now.seconds = monitor.seconds
    monitor.sync()
    position = windows.position(now.step * sequences_per_step(config))
    state.save(run.checkpoints, now, model, optimizer, position, config.save.keep_last)


def resume(
    run: Run,
    now: state.Progress,
    model: GPTModel,
    optimizer: Optimizer,
    windows: Windows,
    config: PretrainConfig,
) -> list[str]:
    """Continue from the newest good checkpoint; returns what there is to say about it."""
    position, notes = state.restore(run.checkpoints, now, model, optimizer)
    expected = windows.position(now.step * sequences_per_step(config))
    if position != expected:
        raise ValueError(
            f"{run.path}: the checkpoint stands at {position} of the data, this configuration at "
            f"{expected}: seed, context_length and tokens per step must stay as they were"
        )
    return [*notes, f"resumed at step {now.step:,}"]

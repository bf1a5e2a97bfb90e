"""The training loop that every recipe shares: steps, metrics, evaluations, checkpoints, stopping.

A recipe brings a `Task`: a model, a loss, samples in an order that is a function of their index,
and how to measure and show the model. Everything else is here, once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gptsmith.batch import Batch
from gptsmith.model import flops
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import in_loop_eval, state
from gptsmith.recipes.in_loop_eval import Exam
from gptsmith.recipes.options import Recipe, TrainConfig
from gptsmith.recipes.report import write_report
from gptsmith.run import Run
from gptsmith.train import runtime
from gptsmith.train.distributed import rank, world_size
from gptsmith.train.monitor import Monitor
from gptsmith.train.optim import Optimizer
from gptsmith.train.schedule import learning_rate
from gptsmith.train.signals import StopSignal
from gptsmith.train.step import Loss, LossSpikeGuard, Step, TrainingDiverged, train_steps

STOPPED = 75  # exit code: stopped by a signal after saving (EX_TEMPFAIL: try again)

# What a resumed run must leave as it was, to go on with the same samples and optimizer state.
FIXED = (
    "optim.kind",
    "train.seed",
    "train.batch_size",
    "train.total_batch_tokens",
    "train.precision",
)

R = TypeVar("R", bound=Recipe)


class Dataset(Protocol):
    """Training rows of T tokens, in an order without end that depends on nothing but the index."""

    @property
    def T(self) -> int: ...  # noqa: N802

    @property
    def per_epoch(self) -> int: ...

    def batch(self, first: int, count: int) -> Batch:
        """Rows first..first+count-1."""
        ...

    def position(self, index: int) -> dict[str, int]:
        """Where the order stands before row `index`, to be compared on resume."""
        ...


@dataclass(frozen=True)
class Task:
    """What one kind of training brings to the loop."""

    model: GPTModel  # on its device, wrapped and frozen as wanted
    loss: Loss
    samples: Dataset
    assess: Callable[[int | None], Mapping[str, float | int | None]]
    """Measure on at most so many validation tokens (None: on all); `val_loss` is among it."""
    val_tokens: int
    texts: Callable[[], Iterator[tuple[str, str]]] = lambda: iter(())
    """Samples of what the model writes: (prompt, text)."""
    exam: Exam | None = None
    """Scores in the tasks of eval.tasks."""


@dataclass(frozen=True)
class Duration:
    """Where the run ends: at `steps`, or at `seconds` on the clock."""

    steps: int | None
    seconds: float | None

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is behind us."""
        return step / self.steps if self.steps else seconds / (self.seconds or 1)


def resolve(config: R, model: ModelConfig, samples: Dataset) -> tuple[R, Duration, list[str]]:
    """Fill in what depends on the machine and the data, once: a resumed run reuses the answers.

    Returns the complete configuration, where the run ends, and why each choice was made.
    """
    train, T = config.train, samples.T
    try:
        device = runtime.choose_device(train.device)
    except ValueError as error:
        raise ValueError(f"--train.device: {error}") from None
    if train.num_threads:
        torch.set_num_threads(train.num_threads)
    arithmetic = runtime.choose_precision(train.precision, device)
    if train.total_batch_tokens and train.total_batch_tokens % (
        train.batch_size * T * world_size()
    ):
        raise ValueError(
            f"train.total_batch_tokens {train.total_batch_tokens} is not a multiple of batch_size "
            f"x context_length x processes = {train.batch_size * T * world_size()}"
        )
    per_step = rows_per_step(config, T)
    rows = (train.epochs or config.default_epochs) * samples.per_epoch
    if train.tokens:
        rows = train.tokens / T
    steps = train.steps or max(1, round(rows / per_step))
    plan = Duration(None if train.seconds else steps, train.seconds)
    work = flops.flops_per_token(model) * steps * per_step * T
    compiled, why = runtime.choose_compile(train.compile, device, work, train.seconds)
    memory = flops.training_memory(model, train.batch_size, T, config.optim.kind)
    there = runtime.memory_bytes(device)
    if there and memory.total > 1.5 * there:  # the formula is for fp32, and within a quarter
        raise ValueError(
            f"model and train.batch_size {train.batch_size} want about {memory.total / 2**30:,.0f} "
            f"GiB, {device} has {there / 2**30:,.0f}: take a smaller batch_size "
            "(total_batch_tokens keeps the step as large), model or context"
        )
    mask = "" if model.mask == "causal()" else f", mask {model.mask}"
    notes = [
        f"model: {flops.parameters(model):,} parameters, context {model.context_length}, "
        f"vocabulary {model.vocab_size}{mask}; about {memory.total / 2**20:,.0f} MiB to train",
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
            num_threads=torch.get_num_threads(),
        )
    )
    return config.model_copy(update=dict(train=train)), plan, notes


def rows_per_step(config: Recipe, T: int) -> int:
    """Rows that one optimizer step reads, over all ranks."""
    return (config.train.total_batch_tokens or config.train.batch_size * T) // T


def train(
    run: Run, task: Task, config: Recipe, plan: Duration, notes: list[str], started: float | None
) -> int:
    """Train until the horizon, early stopping or a signal; the exit code, 0 or STOPPED.

    run: locked until this returns; at 0 it is finished, with its weights and its report. notes:
    what its record begins with. started: time.perf_counter() from which `seconds` counts (None:
    now). Raises Diverged, after saving, when too many steps in a row had to be skipped.
    """
    with run, StopSignal() as stop:
        if config.train.device == "cpu":
            runtime.keep_freed_memory()
        session = _Session(run, task, config, plan)
        if config.resume:
            notes = [*notes, *session.resume()]
        with session.open_monitor(started) as monitor:
            for note in notes:
                monitor.log(session.now.step, "note", message=note)
            if not config.resume:
                session.begin()
            try:
                for step in session.steps():
                    done, best = session.record(step), False
                    if done or _due(config.eval.interval, step.step):
                        best, enough = session.evaluate(done)
                        done = done or enough
                    if done or best or session.save_is_due():
                        session.save()
                    if done:
                        break
                    if stop.received:
                        session.save()
                        monitor.say(f"{stop.received}: saved at step {step.step}; --resume goes on")
                        return STOPPED
            except TrainingDiverged:
                session.now.guard.in_a_row = 0  # a resumed run gets its patience back
                session.save()
                raise
            session.end()
        run.finish("best" if config.eval.patience else "last")
        write_report(run)
    return STOPPED if stop.received else 0  # what follows is for another start


class _Session:
    """The part of a run that this process does."""

    monitor: Monitor

    def __init__(self, run: Run, task: Task, config: Recipe, plan: Duration) -> None:
        self.run, self.task, self.config, self.plan = run, task, config, plan
        self.device = torch.device(config.train.device)
        self.optimizer = Optimizer(task.model, config.optim, self.device.type)
        self.now = state.Progress(
            LossSpikeGuard(config.train.spike_sigmas, config.train.max_skips),
            torch.amp.GradScaler(self.device.type) if config.train.precision == "fp16" else None,
        )
        self.per_step = rows_per_step(config, task.samples.T)
        # The best is judged on the same text each time; the end is measured on more of it.
        tokens = config.eval.tokens
        self.limit, self.last_limit = (
            None if tokens is None or times * tokens >= task.val_tokens else times * tokens
            for times in (1, 10)
        )

    def resume(self) -> list[str]:
        """Continue from the newest good checkpoint; returns what there is to say about it."""
        assert self.run.resumed is not None
        now, (found, damage) = self.now, self.run.resumed
        position = state.restore(found, now, self.task.model, self.optimizer)
        expected = self.task.samples.position(now.step * self.per_step)
        if position != expected:
            raise ValueError(
                f"{self.run.path}: the checkpoint stands at {position} of the data, this "
                f"configuration at {expected}: seed, context and batch must stay as they were"
            )
        return [*damage, f"resumed at step {now.step:,}"]

    def open_monitor(self, started: float | None) -> Monitor:
        now = self.now
        self.monitor = Monitor(
            self.run.path,
            total_steps=self.plan.steps,
            config=self.run.config,
            trackers=self.config.monitor.trackers,
            resume=(now.step, now.seconds) if self.config.resume else None,
            started=started,
            scores=in_loop_eval.levels(self.config.eval.tasks),
        )
        self.mark = self.monitor.seconds, now.tokens  # since when speed is measured
        self.first = now.step
        return self.monitor

    def begin(self) -> None:
        """The state before the first step."""
        if self.config.eval.interval:
            self.now.improves(self.measure(self.limit))
            self.show()
        self.save()

    def steps(self) -> Iterator[Step]:
        config, samples, model = self.config, self.task.samples, self.task.model
        if self.plan.done(self.now.step, self.now.seconds) >= 1 or self.stops_early():
            return iter(())
        loss = self.task.loss
        return train_steps(
            model,
            runtime.compiled(loss) if config.train.compile == "on" else loss,
            lambda s: micro_batches(samples, s * self.per_step, self.per_step, config.train),
            self.optimizer,
            learning_rate=lambda s: learning_rate(
                config.optim, s, self.plan.done(s, self.monitor.seconds)
            ),
            precision=self.arithmetic,
            max_grad_norm=config.optim.max_grad_norm,
            seed=config.train.seed,
            first_step=self.now.step,
            guard=self.now.guard,
            scaler=self.now.scaler,
        )

    @property
    def arithmetic(self) -> runtime.Precision:
        return runtime.choose_precision(self.config.train.precision, self.device)

    def record(self, step: Step) -> bool:
        """Take note of a step; whether the horizon is reached."""
        now, monitor = self.now, self.monitor
        now.step, now.seconds = step.step, monitor.seconds
        now.tokens += step.tokens
        done = self.plan.done(now.step, now.seconds) >= 1
        if step.skipped:
            monitor.log(now.step, "note", message=step.skipped)
        first = step.step == self.first + 1
        if done or first or _due(self.config.monitor.log_interval, step.step):
            seconds, tokens = self.mark
            speed = (now.tokens - tokens) / max(1e-9, now.seconds - seconds)
            self.mark = now.seconds, now.tokens
            monitor.log(
                now.step, "train", epoch=self.epoch(), train_loss=step.loss,
                learning_rate=step.learning_rate, grad_norm=step.grad_norm,
                tokens=now.tokens, tokens_per_second=round(speed, 1),
            )  # fmt: skip
            work = speed * flops.flops_per_token(self.task.model.config)
            mfu = runtime.mfu(work, self.device)
            shown = None if first else speed  # the first step may hold a minute of compiling
            monitor.progress(now.step, loss=step.loss, tokens_per_second=shown, mfu=mfu)
        return done

    def epoch(self) -> float:
        return round(self.now.step * self.per_step / self.task.samples.per_epoch, 4)

    def evaluate(self, done: bool) -> tuple[bool, bool]:
        """Measure and show. Whether this is the best so far, and whether to stop early."""
        config, now, before = self.config, self.now, self.monitor.seconds
        alone = done and not config.eval.interval  # then there is nothing to compare with
        best = now.improves(self.measure(self.last_limit if alone else self.limit))
        enough = self.stops_early()
        if (done or enough) and self.limit is not None and not alone:
            self.measure(self.last_limit)
        self.show()
        if enough:
            message = f"stopped early: best was step {now.best_step}"
            self.monitor.log(now.step, "note", message=message)
        seconds, tokens = self.mark  # evaluation is not training time
        self.mark = seconds + self.monitor.seconds - before, tokens
        return best, enough

    def measure(self, limit: int | None) -> float:
        """Measure on `limit` validation tokens; returns the loss."""
        scores = self.task.assess(limit)
        self.monitor.log(self.now.step, "val", epoch=self.epoch(), **scores)
        loss = scores["val_loss"]
        return math.nan if loss is None else float(loss)

    def show(self) -> None:
        """Let the model answer and write, and draw."""
        if self.task.exam is not None:
            self.monitor.log(self.now.step, "tasks", **self.task.exam())
        for prompt, text in self.task.texts():
            self.monitor.text(self.now.step, prompt, text)
        self.monitor.draw()

    def stops_early(self) -> bool:
        return 0 < self.config.eval.patience <= self.now.evals_since_best

    def save_is_due(self) -> bool:
        overdue = time.perf_counter() - self.now.saved_at > self.config.save.seconds
        return overdue or _due(self.config.save.interval, self.now.step)

    def save(self) -> None:
        """Write a checkpoint; the record up to it is durable first."""
        now, samples = self.now, self.task.samples
        now.seconds = self.monitor.seconds
        self.monitor.sync()
        position = samples.position(now.step * self.per_step)
        keep = self.config.save.keep_last
        state.save(self.run.checkpoints, now, self.task.model, self.optimizer, position, keep)

    def end(self) -> None:
        """What the record should say at last."""
        now, monitor = self.now, self.monitor
        if skipped := now.guard.skipped:
            monitor.log(now.step, "note", message=f"{skipped} of {now.step:,} steps were skipped")
        if now.best_step == 0 and now.evals_since_best:
            message = (
                f"no evaluation was better than the one before training ({now.best_loss:.4g}): "
                "look at the learning rate and at the data"
            )
            monitor.log(now.step, "note", message=message)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def micro_batches(samples: Dataset, first: int, count: int, train: TrainConfig) -> list[Batch]:
    """This rank's share of rows first..first+count-1, in micro-batches of train.batch_size."""
    mine = count // world_size()
    first += rank() * mine
    last = first + mine
    return [
        samples.batch(i, min(train.batch_size, last - i))
        for i in range(first, last, train.batch_size)
    ]

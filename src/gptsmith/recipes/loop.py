"""The training loop of all recipes: steps, metrics, evaluations, checkpoints, stopping.

A recipe provides a `TrainingJob` (job.py): model, loss, dataset, evaluation, samples. The rest is
here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from gptsmith.model import flops
from gptsmith.model.tuning import load_parameters, trainable_state_dict
from gptsmith.recipes.agreement import Agreement, StopRequested
from gptsmith.recipes.job import TrainingJob
from gptsmith.recipes.options import RecipeConfig
from gptsmith.recipes.out_of_memory import out_of_memory
from gptsmith.recipes.plan import Note, Plan
from gptsmith.recipes.prefetch import step_batches
from gptsmith.recipes.report import write_report
from gptsmith.recipes.resume_metrics import last_rate, lost_history
from gptsmith.recipes.run_state import RunState
from gptsmith.run import Run, layout
from gptsmith.train import checkpoint, distributed, runtime, sharding
from gptsmith.train.checkpoint_writer import CheckpointWriter
from gptsmith.train.monitor import Monitor, SilentMonitor, count_events
from gptsmith.train.optim import Optimizer
from gptsmith.train.schedule import LearningRate
from gptsmith.train.signals import StopSignal
from gptsmith.train.step import LossSpikeGuard, Step, TrainingDiverged, train_steps

_JOB = "job"  # tensors of TrainingJob.state in a checkpoint
STOPPED = 75  # exit code: stopped by a signal after saving (EX_TEMPFAIL: try again)

# Settings that must not change on resume: they determine samples and optimizer state.
FIXED = (
    "optim.kind",
    "train.seed",
    "train.batch_size",
    "train.total_batch_tokens",
    "train.precision",
)


def train(run: Run, job: TrainingJob, plan: Plan[RecipeConfig], started: float | None) -> int:
    """Train until the planned end, early stopping or a signal; returns the exit code, 0 or STOPPED.

    run: locked, and released by this function; with exit code 0 it has its final weights and its
    report. started: time.perf_counter() at which `seconds` begins (None: now). Raises
    TrainingDiverged, after saving, if too many steps in a row were skipped.

    With several ranks, all decide alike: the clock is that of rank 0, which alone writes files and
    messages, and a signal to one of them stops all after the same step.
    """
    config = plan.config
    with run, StopSignal() as stop:
        if plan.runtime.device.type == "cpu":
            runtime.keep_freed_memory()
        session: _TrainingSession | None = None
        try:
            session = _TrainingSession(run, job, plan, stop)
            if not _train(session, started):
                return STOPPED
        except torch.OutOfMemoryError as error:
            step = session.state.step if session else 0
            raise out_of_memory(error, run, plan, step, job.dataset.T) from error
        if distributed.rank() == 0:
            job.verify_data()  # data that was not read yet, before the final weights are written
            run.finish("best" if config.eval.patience else "last")
            write_report(run)
        received = distributed.from_rank_0(lambda: stop.received)
    return STOPPED if received else 0  # after 0, a recipe would continue, with its test


def _train(session: _TrainingSession, started: float | None) -> bool:
    """Whether training has ended, or a signal has stopped it."""
    config = session.config
    notes = [*session.plan.notes, *(session.resume() if config.resume else [])]
    with session.open_monitor(started) as monitor, session.writer:
        for note in notes:
            monitor.log(session.state.step, "note", message=str(note))
        try:
            if not config.resume:
                session.start()
            for step in session.steps():
                session.writer.check()
                done, best = session.record(step), False
                if done or _due(config.eval.interval, step.step):
                    with sharding.gathered(session.job.model):
                        best, stops_early = session.evaluate(done)
                    done = done or stops_early
                if done or best or session.save_is_due():
                    session.save()
                if done:
                    break
                if session.agreed.signal:
                    raise StopRequested
        except StopRequested:  # after a step, or within one, which is discarded
            session.stop()
            return False
        except TrainingDiverged:
            session.state.guard.in_a_row = 0  # a resumed run starts with full patience
            session.save(wait=True)
            raise
        session.writer.wait()
        session.end()
    return True


class _TrainingSession:
    """The part of a run that this process executes."""

    monitor: Monitor | SilentMonitor

    def __init__(
        self, run: Run, job: TrainingJob, plan: Plan[RecipeConfig], stop: StopSignal
    ) -> None:
        self.run, self.job, self.plan, self.config = run, job, plan, plan.config
        self.agreed = Agreement(stop, time.perf_counter() + plan.config.save.seconds)
        self.writer = CheckpointWriter(plan.saves_in_background)
        self.saved: int | None = None  # the step that was saved last
        device, train = plan.runtime.device, plan.config.train
        self.loss = job.loss
        if plan.is_sharded:
            sharding.shard(job.model, device, compile_blocks=plan.runtime.compile)
            if job.init_parameter is not None and not self.config.resume:
                sharding.init(job.model, job.init_parameter)
        elif plan.runtime.compile:
            self.loss = runtime.compiled(job.loss)
        self.optimizer = Optimizer(job.model, self.config.optim, device.type)
        self.state = RunState(
            LossSpikeGuard(train.spike_sigmas, train.max_skips),
            LearningRate(plan.config.optim, plan.duration),
            torch.amp.GradScaler(device.type) if plan.runtime.precision.name == "fp16" else None,
        )
        # Evaluations are compared on the same text; the final one uses more of it.
        tokens = self.config.eval.tokens
        self.limit, self.last_limit = (
            None if tokens is None or times * tokens >= job.val_tokens else times * tokens
            for times in (1, 10)
        )

    def resume(self) -> list[Note]:
        """Restore the newest intact checkpoint and remove newer ones; returns notes about it."""
        assert self.run.resumed is not None
        state, (newest, damage) = self.state, self.run.resumed
        saved = newest.state
        expected = self.job.dataset.position(newest.step * self.plan.rows_per_step)
        if saved["position"] != expected:
            raise ValueError(
                f"{self.run.path}: the checkpoint is at {saved['position']} in the data, this "
                f"configuration at {expected}: keep seed, context and batch unchanged"
            )
        model, part = self.job.model, sharding.part(self.job.model)
        trained = {name: sharding.local(p) for name, p in trainable_state_dict(model).items()}
        load_parameters(trained, newest.load("model", part), newest.path)
        self.optimizer.load_state_tensors(newest.load("optimizer", part))
        state.load_json(saved)
        self.saved = newest.step
        if (newest.path / f"{_JOB}.safetensors").is_file():
            self.job.load_state(newest.step, newest.load(_JOB))
        distributed.barrier()  # all ranks have read it, under its present name
        if distributed.rank() == 0:
            checkpoint.clean(newest.path.parent, after=newest.step)
        kept = distributed.from_rank_0(lambda: checkpoint.steps(newest.path.parent))
        if math.isfinite(state.best_loss) and state.best_step not in kept:
            # The best checkpoint is gone, with a newer one that was damaged: look for another.
            state.best_step, state.best_loss, state.evals_since_best = state.step, math.inf, 0
        if distributed.rank() == 0:  # old checkpoints that a killed process did not remove
            keep_last = self.config.save.keep_last
            checkpoint.prune(newest.path.parent, keep_last, self.steps_to_keep())
        rate = saved.get("learning_rate") or last_rate(self.run.metrics, state)
        jump = state.learning_rate.load(rate, state.step, state.seconds)
        changes = (f"changed: {change}" for change in self.run.changes)
        lost = lost_history(
            self.run.metrics, state.step, saved.get("events"), self.config.monitor.log_interval
        )
        texts = [self.run.notice, *damage, *changes, lost, self.resumed_at(), jump]
        return [Note("resume", text) for text in texts if text]

    def resumed_at(self) -> str:
        """At which step the run continues, or that nothing is left to train."""
        total, step = self.plan.duration.steps, self.state.step
        at = f"step {step:,}" + (f" of {total:,}" if total else "")
        if self.progress() < 1 and not self.stops_early():
            return f"continues at {at}"
        further = layout.resume_command(self.run.path, self.config.stage)
        return f"nothing is left to train at {at}; to go on: {further} --train.steps N"

    def open_monitor(self, started: float | None) -> Monitor | SilentMonitor:
        state = self.state
        self.monitor = (
            SilentMonitor(state.seconds)
            if distributed.rank()
            else Monitor(
                self.run.path,
                total_steps=self.plan.duration.steps,
                config=self.run.config,
                trackers=self.config.monitor.trackers,
                resume=(state.step, state.seconds) if self.config.resume else None,
                started=started,
                scores=self.job.evaluate_tasks.references if self.job.evaluate_tasks else {},
                curves=self.job.curves,
                loss_label=self.job.loss_label,
                objective=self.job.objective,
            )
        )
        self.speed_start = self.monitor.seconds, state.tokens  # tokens/s are measured from here
        self.first_step = state.step
        return self.monitor

    def start(self) -> None:
        """Evaluate and save the state before the first step."""
        if self.config.eval.interval:
            with sharding.gathered(self.job.model):
                self.state.improves(self.measure(self.limit))
                self.show()
        self.save(wait=True)  # a run with steps and no checkpoint could not be resumed

    def steps(self) -> Iterator[Step]:
        config, plan = self.config, self.plan
        if distributed.world_size() > 1:
            self.state.seconds = self.agreed.exchange(self.monitor)
        if self.progress() >= 1 or self.stops_early():
            return
        made = nullcontext(self.job.batches) if self.job.batches else step_batches(
            self.job.dataset, plan.rows_per_step, config.train.batch_size, plan.runtime.device,
            end=plan.duration.steps,
        )  # fmt: skip
        with made as batches:
            steps = train_steps(
                self.job.model,
                self.loss,
                batches,
                self.optimizer,
                learning_rate=lambda s: self.state.learning_rate.start_step(
                    s, self.agreed.seconds(self.monitor)
                ),
                precision=plan.runtime.precision,
                max_grad_norm=config.optim.max_grad_norm,
                seed=config.train.seed,
                first_step=self.state.step,
                guard=self.state.guard,
                scaler=self.state.scaler,
                interrupt=self.agreed.check_signal,
            )
            yield from runtime.deterministic(steps) if config.train.deterministic else steps

    def progress(self) -> float:
        return self.plan.duration.progress(self.state.step, self.state.seconds)

    def record(self, step: Step) -> bool:
        """Log a step; returns whether the run is complete."""
        state, monitor = self.state, self.monitor
        state.step, state.seconds = step.step, self.agreed.exchange(monitor)
        state.tokens += step.tokens
        done = self.progress() >= 1
        if step.skipped:
            monitor.log(state.step, "note", message=step.skipped)
        metrics = {"loss": step.loss, **step.metrics, **self.job.metrics()}
        first = step.step == self.first_step + 1
        if done or first or _due(self.config.monitor.log_interval, step.step):
            seconds, tokens = self.speed_start
            speed = (state.tokens - tokens) / max(1e-9, state.seconds - seconds)
            self.speed_start = state.seconds, state.tokens
            monitor.log(
                state.step, "train", epoch=self.epoch(),
                learning_rate=step.learning_rate, grad_norm=step.grad_norm,
                tokens=state.tokens, tokens_per_second=round(speed, 1),
                **{f"train_{name}": value for name, value in metrics.items()},
            )  # fmt: skip
            work = speed * flops.flops_per_token(self.job.model.config, self.job.dataset.T)
            mfu = runtime.mfu(work / distributed.world_size(), self.plan.runtime.device)
            shown = None if first else speed  # the first step may include a minute of compiling
            monitor.line.show(
                state.step, metrics[self.job.objective], self.job.objective,
                tokens_per_second=shown, mfu=mfu,
            )  # fmt: skip
        return done

    def epoch(self) -> float:
        rows = self.state.step * self.plan.rows_per_step
        return round(rows / self.job.dataset.per_epoch, 4)

    def evaluate(self, done: bool) -> tuple[bool, bool]:
        """Evaluate, and show samples and curves; returns (best so far, stop early)."""
        config, state, before = self.config, self.state, self.monitor.seconds
        single = done and not config.eval.interval  # the run's only evaluation
        best = state.improves(self.measure(self.last_limit if single else self.limit))
        stops_early = self.stops_early()
        if (done or stops_early) and self.limit is not None and not single:
            self.measure(self.last_limit)
        self.show()
        if stops_early:
            message = f"stopped early: best was step {state.best_step}"
            self.monitor.log(state.step, "note", message=message)
        seconds, tokens = self.speed_start  # evaluation is not training time
        self.speed_start = seconds + self.monitor.seconds - before, tokens
        return best, stops_early

    @property
    def sign(self) -> int:
        """Of the objective in what the best checkpoint has least of."""
        return 1 if self.job.objective == "loss" else -1

    def measure(self, limit: int | None) -> float:
        """Evaluate on `limit` validation tokens; returns what the best checkpoint has least of."""
        scores = self.job.evaluate(limit)
        self.monitor.log(self.state.step, "val", epoch=self.epoch(), **scores)
        value = scores[f"val_{self.job.objective}"]
        return math.nan if value is None else self.sign * float(value)

    def show(self) -> None:
        """Evaluate the tasks, generate samples, draw the curves. Rank 0 does the last two while the
        others wait for it in the next step."""
        if self.job.evaluate_tasks is not None:
            self.monitor.log(self.state.step, "tasks", **self.job.evaluate_tasks())
        if distributed.rank():
            return
        with distributed.alone():
            for prompt, text in self.job.samples():
                self.monitor.text(self.state.step, prompt, text)
        self.monitor.draw()

    def stops_early(self) -> bool:
        return 0 < self.config.eval.patience <= self.state.evals_since_best

    def save_is_due(self) -> bool:
        return self.agreed.save_is_due or _due(self.config.save.interval, self.state.step)

    def save(self, wait: bool = False) -> None:
        """Save the state as it is now: make the metrics durable, then write a checkpoint and remove
        old ones. With save.async, training may go on meanwhile, unless it is to `wait`."""
        state, step, writer = self.state, self.state.step, self.writer
        self.saved = step
        writer.wait()
        began = time.perf_counter()
        model = trainable_state_dict(self.job.model)
        if sharding.is_sharded(self.job.model):
            model = sharding.gather_sharded(model, writer.memory)
        elif writer.memory is not None and distributed.rank() == 0:
            model = writer.memory.copy(model)
        optimizer = self.optimizer.state_tensors(writer.memory)
        of_job = self.job.state(step)
        if not isinstance(self.monitor, Monitor):  # rank 0 writes
            return
        state.seconds, self.agreed.next_save = self.monitor.seconds, math.inf
        position = self.job.dataset.position(state.step * self.plan.rows_per_step)
        more = {"position": position, "events": count_events(self.monitor.events)}
        saved, kept = {**state.to_json(), **more}, self.steps_to_keep()

        def write() -> None:
            self.monitor.sync()
            folder, tensors = self.run.checkpoints, {"model": model, "optimizer": optimizer}
            if of_job:
                tensors[_JOB] = {**of_job}
            checkpoint.save(folder, step, tensors, saved)
            checkpoint.prune(folder, self.config.save.keep_last, kept)
            now = time.perf_counter()
            self.agreed.next_save = now + max(self.config.save.seconds, 30 * (now - began))

        writer.start(write)
        if wait:
            writer.wait()

    def stop(self) -> None:
        """Save the last complete step, unless that is done, and report the signal."""
        if self.saved != self.state.step:
            self.save()
        self.writer.wait()
        signal, step = self.agreed.signal, self.state.step
        self.monitor.line.print(f"{signal}: saved at step {step}; --resume continues")

    def steps_to_keep(self) -> set[int]:
        """The steps of checkpoints that stay although they are old: the best one."""
        return {self.state.best_step} if math.isfinite(self.state.best_loss) else set()

    def end(self) -> None:
        """Log the final notes."""
        state, monitor = self.state, self.monitor
        if skipped := state.guard.skipped:
            message = f"{skipped} of {state.step:,} steps were skipped"
            monitor.log(state.step, "note", message=message, closing=True)
        if unreached_peak := state.learning_rate.unreached_peak(state.step):
            monitor.log(state.step, "note", message=unreached_peak, closing=True)
        if state.best_step == 0 and state.evals_since_best:
            message = (
                "no evaluation was better than the one before training "
                f"({self.sign * state.best_loss:.4g}): {self.job.remedy()}"
            )
            monitor.log(state.step, "note", message=message, closing=True)


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0

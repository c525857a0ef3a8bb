"""The training loop: images and clips, every task, one process or many.

A run is a folder, and the same command on the same folder resumes where the run stopped, exactly: losses and weights
are those of a run that never stopped. That works because everything random is a pure function of numbers that a
resumed run knows again, so a checkpoint needs weights, moments and the step, but no generator state and no position in
the data:

* the order of samples: all epochs, each permuted by (seed, epoch), form one endless stream. With a global batch of n,
  step s takes the positions s n to (s + 1) n - 1 of it, each process its share of them, rank after rank, and each
  micro-batch its part of the share (`data.loading.StepSampler`). Only the shares depend on the number of processes;
  the batch of a step does not;
* augmentation of a sample: (seed, epoch, index);
* drop path, mixup and CutMix: the global generators, seeded from (seed, step, micro-batch, rank) before each forward
  pass (`seed_step`);
* the learning rate: the step (`Schedule.lr_at`).

`self.step` counts finished optimizer steps, so it is also the index of the next one, and the only number from which a
run resumes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_swinv2.config import Config
from video_swinv2.data.datasets import Batch
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.distributed.collectives import all_reduce_max, all_reduce_sum, print_on_rank_zero
from video_swinv2.distributed.lifeline import Lifeline
from video_swinv2.distributed.signals import EXIT_RESTART, StopSignal, remove_restart_marker, write_restart_marker
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.engine.base import Engine, StepOutcome, StepSettings, seed_step
from video_swinv2.engine.checkpoint import Checkpoints
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import make_schedule, parameter_groups
from video_swinv2.engine.zero3 import partitioned_construction, whole_numel
from video_swinv2.errors import UsageError, UserError
from video_swinv2.progress import Progress
from video_swinv2.training.cadence import make_cadence
from video_swinv2.training.faults import Faults, explain_exhaustion
from video_swinv2.training.metrics import LogInterval, MetricLog, check_wandb
from video_swinv2.training.record import describe_batch, describe_learning_rate, end_table, write_record
from video_swinv2.training.start import find_start
from video_swinv2.training.tasks.base import Task
from video_swinv2.training.throughput import Throughput, WaitTimer
from video_swinv2.training.validation import evaluation_mode, validate


class StoppedError(UserError):
    """The run was asked to stop and has saved a checkpoint; the same command resumes it."""

    exit_code = EXIT_RESTART


def run(config: Config, make_task: Callable[[Config], Task]) -> Path:
    """Train to the last step and return the run folder.

    Raises UserError or UsageError for what the user can fix, and StoppedError after SIGTERM, SIGUSR1 or SIGINT, once
    the checkpoint is on disk. If one of several processes dies or fails, all of them end; the error is raised or
    printed by rank 0 alone.
    """
    world = join_world(config.engine.device)
    fix = f"start the same command again to resume from the newest checkpoint of {config.out}"
    try:
        with Lifeline(world, fix) as lifeline:
            try:
                with explain_exhaustion(config, world):
                    _run(config, make_task, world)
            except UserError as error:
                # An expected error has one line to show, which rank 0 prints for whichever process met it.
                lifeline.fail(str(error).strip().splitlines()[-1], error.exit_code)
                raise
            except Exception:
                # An unexpected one may be the echo of another process's death, such as a broken collective: wait a
                # moment for the lifeline to report that instead of showing a misleading traceback.
                lifeline.wait_for_verdict()
                raise
    finally:
        gc.unfreeze()  # see _train_steps
        leave_world()
    return Path(config.out)


def _run(config: Config, make_task: Callable[[Config], Task], world: World) -> None:
    if config.model.attention == "flex" and world.device.type != "cuda":
        raise UsageError("model.attention: flex trains on CUDA only; use sequential or auto")
    check_wandb(config.wandb)
    torch.manual_seed(config.seed)  # for the fresh weights only; later every step seeds itself
    with StopSignal() as signals:
        # Nothing but the task may be built inside: ZeRO-3's construction redirects every new tensor.
        with partitioned_construction(config.engine, world):
            task = make_task(config)
        TrainingRun(config, task, world, signals).train()


class TrainingRun:
    """One run: its folder, model and engine, and how far it has got."""

    def __init__(self, config: Config, task: Task, world: World, signals: StopSignal) -> None:
        self.config, self.task, self.world, self.signals = config, task, world, signals
        self.folder = Path(config.out)
        self.samples = len(task.train_samples)
        self.plan = plan_batch(config.optim.batch, config.optim.micro_batch, world.size, task.train_samples.repeats)
        self.cadence = make_cadence(config, self.samples)
        self.steps = self.cadence.steps
        self.schedule = make_schedule(config.optim, self.steps, self.samples)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints, self._print)
        self.parameters = sum(whole_numel(parameter) for parameter in task.module.parameters())
        self.faults = Faults(config, world, task.train_samples)
        self.throughput = Throughput(task.training_flops(), config, world)
        self.last_metrics: dict[str, float] = {}

        start = find_start(task, config, self.checkpoints, self._identity(), self.steps, world)
        self.step = start.step
        self.best, self.best_step = start.best, start.best_step
        self.provenance = start.provenance
        self.seconds_before = start.seconds
        self.faults.restore(start.faults)
        # The engine is built around the module as it is now; only then can it load a checkpoint's moments.
        self.engine = self._make_engine()
        if start.checkpoint:
            self.engine.load(start.checkpoint)
        self.started = self.saved = time.monotonic()

    def train(self) -> None:
        """Take all steps that are left."""
        if self.step >= self.steps or (self.cadence.validates_at(self.step) and self._is_stale()):
            self._print(f"{self.folder}: finished at step {self.step}; choose another out or more optim.epochs")
            return
        self._write_record()
        log = None
        if self.world.rank == 0:
            remove_restart_marker(self.folder)
            log = MetricLog(self.folder, self.step, self.config.wandb)
        try:
            if self.step == 0:
                # Shows what the start is worth, and lets a broken validation fail now rather than hours later.
                self._validate(log)
            self._train_steps(log)
        finally:
            if log:
                log.close()
            self.checkpoints.wait()
        self._write_record()
        self._print(end_table(self.folder, self._record(), self.last_metrics))
        self._print(f"next: {self.task.next_command(self.folder)}")

    def _train_steps(self, log: MetricLog | None) -> None:
        waits = WaitTimer()
        batches = waits.iterate(self._load_batches())
        interval = LogInterval()
        self.engine.module.train()
        batch, rank = self.plan.batch, self.world.rank
        total, done = self.steps * batch, self.step * batch
        with Progress(self.folder.name, total, unit="samples", shown=rank == 0, done=done) as progress:
            while self.step < self.steps:
                outcome = self._take_step(batches, interval)
                # From here on the step counts as done: whatever is saved or logged below belongs to its end.
                self.step += 1
                stopping, saving = self._decide_together(outcome, interval)
                progress.advance(batch, waits.seconds, f"loss {interval.last_loss:.4f}")
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    self._log(log, interval, waits.seconds)
                    interval = LogInterval(waits.seconds)
                if self.step == 1:
                    # What is alive after one step stays alive: model, optimizer, data set. Frozen, it is skipped by
                    # every later garbage collection, which would otherwise walk through all of it again.
                    gc.collect()
                    gc.freeze()
                if self.cadence.validates_at(self.step):
                    started = time.perf_counter()
                    self._validate(log)
                    self._save()
                    interval.started += time.perf_counter() - started  # the logged speed is that of training alone
                    if self._is_stale():
                        break
                elif stopping or saving:
                    self._save()
                # After the last step there is nothing left to stop: the run ends normally.
                if stopping and self.step < self.steps:
                    self._stop()  # raises StoppedError

    def _load_batches(self) -> Iterator[Batch]:
        """Every micro-batch that this process still has to take, in order."""
        return iter(
            training_loader(
                self.task.train_samples,
                self.plan,
                seed=self.config.seed,
                rank=self.world.rank,
                first=self.step,
                last=self.steps,
                pin=self.world.device.type == "cuda",
            )
        )

    def _take_step(self, batches: Iterator[Batch], interval: LogInterval) -> StepOutcome:
        """One optimizer step: forward and backward of each micro-batch, then the update."""
        # Written every step from the config, never restored: a run resumed with other values uses those.
        self.engine.set_lr(self.schedule.lr_at(self.step))
        outcome = None
        interval.begin_step()
        for micro in range(self.plan.accumulation):
            batch = next(batches)
            self.faults.record_batch(batch)
            # Before the forward pass, since mixing and drop path draw from the generators that this seeds.
            seed_step(self.config.seed, self.step, micro, self.world.rank)
            loss = self.task.loss(self.engine.forward, batch.to(self.world.device))
            self.engine.backward(loss)  # the engine divides by the number of micro-batches
            interval.add(batch, loss.detach())
            outcome = self.engine.step()  # None until the last micro-batch of the step
        if outcome is None:
            raise RuntimeError("the engine did not end the step that the batch plan ends here")
        interval.grad_norm = outcome.grad_norm
        return outcome

    def _decide_together(self, outcome: StepOutcome, interval: LogInterval) -> tuple[bool, bool]:
        """Whether to stop and whether to write a checkpoint after this step, the same on every process.

        Signals reach processes at different moments and clocks differ, but stopping and saving are collective: one
        process doing them alone would wait for the others forever. So every flag is reduced by one collective per
        step, and each process acts if any process has the flag set.
        """
        due = time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes
        # A step that was skipped only because fp16's loss scale was too high is no fault of the data.
        fault = not outcome.applied and not outcome.rescaled
        stopping, saving, skipped = all_reduce_max(self.world, float(self.signals.requested), float(due), float(fault))
        self.faults.record_step(self.step, bool(skipped), interval.step_inputs)
        return bool(stopping), bool(saving)

    def _log(self, log: MetricLog | None, interval: LogInterval, waited_seconds: float) -> None:
        """Write a line of training metrics, averaged over all processes. Collective."""
        loss, micro_batches, broken = all_reduce_sum(
            self.world, [interval.loss_sum(), interval.micro_batches, self.faults.broken_samples]
        )
        # At least one epoch's worth, or the first broken file of a run would already be too large a share.
        self.faults.check_broken_share(int(broken), max(self.step * self.plan.batch, self.samples))
        if log is None:
            return
        # Micro-batches of this process / accumulation = steps; each step takes a global batch.
        samples = interval.micro_batches / self.plan.accumulation * self.plan.batch
        seconds = time.perf_counter() - interval.started
        speed = self.throughput.add_interval(samples, seconds, waited_seconds - interval.waited_seconds)
        if advice := self.throughput.advice(self.faults.slowest):
            self._print(advice)
        values = {
            "epoch": self.step * self.plan.batch / self.samples,
            "train/loss": loss / micro_batches,
            "train/lr": self.schedule.lr_at(self.step - 1),  # of the step just taken
            "train/grad_norm": interval.grad_norm,
            "train/skipped_steps": self.faults.skipped,
            "train/broken_samples": broken,
            **{f"speed/{key}": value for key, value in speed.items()},
        }
        log.write(self.step, values)

    def _validate(self, log: MetricLog | None) -> None:
        """Measure on the whole validation split, write the last weights and, if they are the best so far, those too."""
        metrics: dict[str, float] = {}
        task, engine, samples = self.task, self.engine, self.task.val_samples
        with evaluation_mode(engine, averaged=self.config.optim.ema > 0) as weights:
            if samples is not None:
                metrics = validate(task, engine, samples, self.plan.micro, self.world, self.faults.record_unread)
            picture = task.picture(engine.forward, self.world.device) if self.cadence.draws_at(self.step) else None
        if log and picture is not None:
            log.write_picture(self.step, picture)
        if log and metrics:
            log.write(self.step, metrics)
        is_best = self._update_best(metrics)
        self.last_metrics = metrics
        note = " (best so far)" if self.step and metrics and is_best else ""
        shown = ", ".join(f"{key} {number:.4f}" for key, number in metrics.items()) or "no validation split"
        self._print(f"step {self.step}/{self.steps}: {shown}{note}")
        self.faults.synchronise()
        if self.step and weights is not None:
            self._write_weights(weights, metrics, is_best)
        self._write_record()

    def _update_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are the best so far; without a validation split the newest weights always are."""
        value = metrics.get(self.task.best_metric)
        is_best = value is None or self.best is None or (value > self.best) == self.task.higher_is_better
        if self.step and value is not None and is_best:  # the weights before the first step are not a candidate
            self.best, self.best_step = value, self.step
        return is_best

    def _is_stale(self) -> bool:
        return self.cadence.is_stale(self.step, self.best, self.best_step)

    def _write_weights(self, weights: Mapping[str, Tensor], metrics: Mapping[str, float], is_best: bool) -> None:
        ema = self.config.optim.ema
        provenance = self.provenance | {
            "task": self.task.name,
            "step": self.step,
            "data": self.task.data_facts,
            "weights": f"averaged over the steps, decay {ema}" if ema else "as trained",
            **metrics,
        }
        self.task.save(self.folder / "last.safetensors", weights, provenance)
        if is_best:
            self.task.save(self.folder / "model.safetensors", weights, provenance)

    def _save(self) -> None:
        """Start writing a checkpoint. Collective: the engine gathers its partitions, the faults are merged."""
        tensors = self.engine.training_state()
        faults = self.faults.state()
        self.saved = time.monotonic()
        if tensors is None:  # not rank 0
            return
        state: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "faults": faults,
            "seconds": self._seconds(),
            "identity": self._identity(),
            "provenance": self.provenance,
            "cpb_norm": [list(norm) for norm in self.task.encoder.cpb_norm],
        }
        self.checkpoints.save(tensors, state, step=self.step)

    def _stop(self) -> None:
        """Wait for the checkpoint, leave the restart marker and end the run with StoppedError."""
        self.checkpoints.wait()
        if self.world.rank == 0:
            write_restart_marker(self.folder)
        # A barrier: the first process to exit makes the launcher end the others, and rank 0 may still be writing.
        all_reduce_max(self.world, 0.0)
        raise StoppedError(
            f"{self.folder}: stopped at step {self.step} of {self.steps} by {self.signals.name or 'another process'}; "
            "the checkpoint is saved; the same command resumes the run"
        )

    def _seconds(self) -> float:
        """Wall time of this run, including its interrupted parts."""
        return self.seconds_before + time.monotonic() - self.started

    def _identity(self) -> dict[str, object]:
        """What must not change when a run is resumed, because it decides which samples a step sees."""
        return {"samples": self.samples, "batch": self.plan.batch, "seed": self.config.seed}

    def _print(self, text: str) -> None:
        print_on_rank_zero(self.world, text)

    def _make_engine(self) -> Engine:
        optim, engine = self.config.optim, self.config.engine
        groups = parameter_groups(
            self.task.module,
            self.task.encoder.depths,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            backbone_lr=optim.backbone_lr,
        )
        settings = StepSettings(
            accumulation=self.plan.accumulation, clip_norm=optim.clip_norm, micro_batch=self.plan.micro, ema=optim.ema
        )
        self._print(f"{describe_batch(self.config, self.plan)}; {self.samples} samples, {self.steps} steps")
        self._print(f"{len(groups)} parameter groups; {describe_learning_rate(optim)}")
        betas, lr = optim.betas, self.schedule.lr_at(0)
        return make_engine(self.task.module, groups, engine, settings, self.world, lr=lr, betas=betas, eps=optim.eps)

    def _write_record(self) -> None:
        if self.world.rank == 0:
            write_record(self.folder, self.config, self._record())

    def _record(self) -> dict[str, Any]:
        """What run.json holds: what this run is, how far it has got, and what it has cost."""
        seconds = self._seconds()
        return {
            "step": self.step,
            "steps": self.steps,
            "stopped_early": self.step < self.steps and self.cadence.validates_at(self.step) and self._is_stale(),
            "best": self.best,
            "best_metric": self.task.best_metric,
            "best_step": self.best_step,
            "task": self.task.name,
            "init": self.provenance,
            "parameters": self.parameters,
            "data": self.task.data_facts,
            "batch": self.plan.batch,
            "processes": self.world.size,
            "micro_batch": self.plan.micro,
            "accumulation": self.plan.accumulation,
            "repeats": self.task.train_samples.repeats,
            "device": str(self.world.device),
            "seed": self.config.seed,
            "skipped_steps": self.faults.skipped,
            "broken_files": list(self.faults.broken),
            "slowest_file": list(self.faults.slowest),
            "speed": self.throughput.overall(),
            "hours": seconds / 3600,
            "device_hours": seconds * self.world.size / 3600,
            "decoder": "pyav",
        }

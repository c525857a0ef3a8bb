"""The one training loop: for images and clips, for every task, in one process or many.

A run lives in a folder. Starting the same command on the same folder again resumes the run exactly: losses and weights
are those of a run that was never interrupted. This works because everything random is a pure function of numbers that
a resumed run knows too. A checkpoint therefore contains the weights, Adam's moments and the step, but no generator
state and no position in the data:

* The order of samples: all epochs, each permuted by (seed, epoch), form one endless stream. With a global batch of n,
  step s takes positions s n to (s + 1) n - 1 of it. The processes take equal shares of these in rank order, and cut
  their shares into micro-batches (`data.loading.StepSampler`). The number of processes changes the shares, but not the
  global batch of a step.
* The augmentation of a sample depends on (seed, epoch, sample number).
* Drop path, mixup and CutMix draw from the global generators, which are seeded from (seed, step, micro-batch, rank)
  before each forward pass (`seed_step`).
* The learning rate depends on the step (`Schedule.lr_at`).

`TrainingRun.step` is the number of finished optimizer steps. It is also the index of the next step, counted from 0, and
the only number that a run needs in order to resume.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from video_swinv2.config import Config, plain_values
from video_swinv2.data.datasets import Batch
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.data.sources import refuse_inside_tree
from video_swinv2.distributed.agreement import exclusive_folder, require_agreement
from video_swinv2.distributed.collectives import all_reduce_max, all_reduce_sum, print_on_rank_zero
from video_swinv2.distributed.devices import computing_precision
from video_swinv2.distributed.session import distributed_session
from video_swinv2.distributed.signals import EXIT_RESTART, StopSignal, remove_restart_marker, write_restart_marker
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import Engine, StepOutcome, StepSettings, seed_step
from video_swinv2.engine.checkpoint import Checkpoints
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import make_schedule, parameter_groups
from video_swinv2.engine.zero3 import partitioned_construction, whole_numel
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import terminal_lines
from video_swinv2.progress import Progress
from video_swinv2.training.best import Best, choose_metric, metrics_text
from video_swinv2.training.cadence import make_cadence
from video_swinv2.training.faults import Faults, explain_exhaustion
from video_swinv2.training.metrics import LogInterval, MetricLog, check_wandb
from video_swinv2.training.record import (
    arithmetic,
    describe_batch,
    describe_learning_rate,
    end_table,
    finished_line,
    package_versions,
    run_title,
    write_record,
)
from video_swinv2.training.start import PlanMicroBatch, choose_micro_batch, continue_history, find_start
from video_swinv2.training.tasks.base import MakeTask, Task
from video_swinv2.training.throughput import Throughput, WaitTimer
from video_swinv2.training.validation import evaluation_mode, validate

# Constructor arguments of the model that a resumed run may not change. Others, such as drop path and the attention
# backend, change how it learns or computes, but not what the weights mean.
MODEL_IDENTITY = (
    "embed_dim",
    "depths",
    "num_heads",
    "num_classes",
    "frames",
    "image_size",
    "patch_size",
    "window",
    "extra_norm_every",
)


class StoppedError(UserError):
    """The run was asked to stop and has saved a checkpoint, so the same command resumes it."""

    exit_code = EXIT_RESTART


def run(
    config: Config, make_task: MakeTask, plan_micro_batch: PlanMicroBatch | None = None, *, accept_changes: bool = False
) -> Path:
    """Train until the last step, or until the run ends early, and return the run folder.

    plan_micro_batch: chooses `optim.micro_batch` if neither the config nor the run that is resumed does. Without it, a
    process's whole share of the batch is one micro-batch.
    accept_changes: whether a run that is resumed may go on with other settings that affect what the model learns.

    Raises UserError or UsageError for problems that the user can fix, and StoppedError after SIGTERM, SIGUSR1 or
    SIGINT, once the checkpoint is on disk. With several processes, nothing is raised: if one of them fails, dies or
    does not answer, all of them end, with one report of the cause.
    """
    advice = f"start the same command again to resume from the newest checkpoint of {config.out}"
    engine = config.engine
    try:
        with distributed_session(
            engine.device,
            advice,
            meeting_seconds=engine.meeting_seconds,
            silence_seconds=engine.silence_seconds,
            end_with_launcher=False,  # StopSignal notices that, and the run saves a checkpoint first
        ) as world:
            settings = {**plain_values(config), "--accept-changes": accept_changes}
            require_agreement(world, {"version of": package_versions(), **settings})
            if plan_micro_batch:
                config = choose_micro_batch(
                    config, plan_micro_batch, Checkpoints(Path(config.out, "checkpoints")), world
                )
            with explain_exhaustion(config, world):
                _run(config, make_task, world, accept_changes)
    finally:
        gc.unfreeze()  # undoes the gc.freeze of _train_steps, for programs that go on after the run
    return Path(config.out)


def _run(config: Config, make_task: MakeTask, world: World, accept_changes: bool) -> None:
    """Build the task and train it; signals become a request to stop from the construction of the task on."""
    if config.model.attention == "flex" and world.device.type != "cuda":
        raise UsageError("model.attention: flex trains on CUDA only; use sequential or auto")
    check_wandb(config.wandb)
    refuse_inside_tree(Path(config.out), config.data.source)

    def construction(data_facts: Mapping[str, object]) -> AbstractContextManager[None]:
        # Before the model is built, because under ZeRO-3 that is the first thing that all processes do together.
        require_agreement(world, {"data": data_facts})
        return partitioned_construction(config.engine, world)

    busy = f"{config.out}: another run is training here; wait for it, or choose another out"
    with StopSignal() as signals, exclusive_folder(Path(config.out), world, busy):
        torch.manual_seed(config.seed)  # for the initial weights only; each forward pass is seeded separately
        TrainingRun(config, make_task(config, construction), world, signals, accept_changes=accept_changes).train()


class TrainingRun:
    """One run: its folder, model and engine, and its progress.

    Constructing it finds the start of the run and loads it, so that afterwards `step` is the number of finished steps.
    """

    def __init__(
        self, config: Config, task: Task, world: World, signals: StopSignal, *, accept_changes: bool = False
    ) -> None:
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

        metric = choose_metric(config.best_metric, task.metrics)
        self.best_by = {"best_metric": metric, "val_fingerprint": task.data_facts.get("val_fingerprint")}
        start = find_start(task, config, self.checkpoints, self._identity(), self.best_by, self.steps, world)
        self.step = start.step
        self.configs, self.changes = continue_history(start, config, accept_changes)
        self.best = Best(metric, task.metrics[metric], start.best, start.best_step, start.improved_step)
        self.provenance = start.provenance
        self.seconds_before = start.seconds
        self.faults.restore(start.faults)
        # The order matters. ZeRO copies the module's weights when the engine is built, so those of `init` are in the
        # module already. A checkpoint is loaded afterwards, by the engine, which alone knows where the moments belong.
        self.engine = self._make_engine()
        for note in task.notes:
            self._print(note)
        if start.checkpoint:
            self.engine.load(start.checkpoint)
        self.started = self.saved = time.monotonic()

    def train(self) -> None:
        """Take the remaining steps, and print the outcome and the command to run next.

        Does nothing but print a line if the run had finished before, at its last step or early.
        """
        if self._is_finished():
            self._print(finished_line(self.config, self.step, self.steps))
            return
        self._print(*(f"{change} (since step {self.step})" for change in self.changes))
        # Written at the start, after each validation and at the end, so a run that is killed has a record too.
        self._write_record()
        log = None
        if self.world.rank == 0:
            # The marker asks job scripts to start the run again, which has just happened.
            remove_restart_marker(self.folder)
            log = MetricLog(self.folder, self.step, self.config.wandb)
        try:
            if self.step == 0:
                # Measures the initial weights, and makes a broken validation fail now rather than hours later.
                self._validate(log)
            self._train_steps(log)
        finally:
            if log:
                log.close()
            # Also after an error: the checkpoint that is being written is what the next start resumes from.
            self.checkpoints.wait()
        self._write_record()
        self._print(*end_table(self.folder, self._record(), self.last_metrics))
        samples = self.task.val_samples
        note = self.best.noise_note(self.step, self.last_metrics, len(samples)) if samples is not None else ""
        # As a comment of the shell, so that the whole line can be pasted.
        self._print(f"next: {self.task.next_command(self.folder)}{note and f'  # {note}'}")

    def _train_steps(self, log: MetricLog | None) -> None:
        """Take steps until the last one, the early end, or a request to stop (StoppedError).

        After each step, in this order: agree with the other processes, log, validate, save, stop.
        """
        # The loader reads ahead in worker processes; `waits` adds up the time that it keeps the device waiting.
        waits = WaitTimer()
        batches = waits.iterate(self._load_batches())
        interval = LogInterval()
        self.engine.module.train()
        batch, rank = self.plan.batch, self.world.rank
        total, done = self.steps * batch, self.step * batch  # in samples of all processes
        first_step = self.step + 1
        with Progress(run_title(self.folder), total, unit="samples", shown=rank == 0, done=done) as progress:
            while self.step < self.steps:
                outcome = self._take_step(batches, interval)
                # The step is finished: everything that is logged or saved below describes the state after it.
                self.step += 1
                stopping, saving = self._decide_together(outcome, interval)
                epoch = f"epoch {self.step * batch / self.samples:.1f} of {self.config.optim.epochs:g}"
                progress.advance(batch, waits.seconds, f"{epoch}, loss {interval.last_loss:.4f}")
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    self._log(log, interval, waits.seconds)
                    interval = LogInterval(waits.seconds)
                if self.step == first_step:
                    # Objects that are alive after the first step (model, optimizer, data set) stay alive for the whole
                    # run. Freezing excludes them from every later garbage collection, which would otherwise traverse
                    # all of them again.
                    gc.collect()
                    gc.freeze()
                # A validation is always followed by a checkpoint, so that best and last weights, metrics and checkpoint
                # agree and a resumed run does not validate this step again.
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
        """The micro-batches of this process from the current step to the last one, in order."""
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
        # Set at every step from the config and never restored, so a run that is resumed with other values uses them.
        self.engine.set_lr(self.schedule.lr_at(self.step))
        outcome = None
        # If the step is skipped, record_step writes down the inputs that are collected from here on.
        interval.begin_step()
        for micro in range(self.plan.accumulation):
            batch = next(batches)
            self.faults.record_batch(batch)
            # Before the loss, because mixing and drop path draw from the generators that this call seeds.
            seed_step(self.config.seed, self.step, micro, self.world.rank)
            # A scalar, the mean over the micro-batch.
            loss = self.task.loss(self.engine.forward, batch.to(self.world.device))
            self.engine.backward(loss)  # the engine divides by the number of micro-batches
            interval.add(batch, loss.detach())
            outcome = self.engine.step()  # None until the last micro-batch of the step
        if outcome is None:
            raise RuntimeError("the engine did not end the step that the batch plan ends here")
        interval.grad_norm = outcome.grad_norm
        return outcome

    def _decide_together(self, outcome: StepOutcome, interval: LogInterval) -> tuple[bool, bool]:
        """Whether to stop and whether to write a checkpoint after this step: the same answer on every process.

        Signals reach the processes at different times, and their clocks differ. But stopping and saving are collective:
        a process that did either alone would wait for the others forever. So each step has one collective that takes
        the maximum of every flag, and all processes act if any of them has the flag set.
        """
        due = time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes
        # fp16 skips a step now and then to lower its loss scale. That is normal and not recorded as a fault.
        fault = not outcome.applied and not outcome.rescaled
        stopping, saving, skipped = all_reduce_max(self.world, float(self.signals.requested), float(due), float(fault))
        self.faults.record_step(self.step, bool(skipped), interval.step_inputs)
        return bool(stopping), bool(saving)

    def _log(self, log: MetricLog | None, interval: LogInterval, waited_seconds: float) -> None:
        """Write a line of training metrics for the interval. Collective.

        The loss is the mean over the micro-batches of all processes whose loss is finite; without any, it is left out.
        The speed is the one that rank 0 measures.
        """
        loss, finite, broken = all_reduce_sum(self.world, [*interval.finite_losses(), self.faults.broken_samples])
        # The share is taken of at least one epoch, or the first broken file of a run would already exceed it. All
        # processes have the same sums here, so either all of them raise or none does.
        self.faults.check_broken_share(int(broken), max(self.step * self.plan.batch, self.samples))
        if log is None:
            return
        # The number of steps is that of this process's micro-batches / accumulation; each step takes a global batch.
        samples = interval.micro_batches / self.plan.accumulation * self.plan.batch
        seconds = time.perf_counter() - interval.started
        speed = self.throughput.add_interval(samples, seconds, waited_seconds - interval.waited_seconds)
        if advice := self.throughput.advice(self.faults.slowest):
            self._print(advice)
        values = {
            "epoch": self.step * self.plan.batch / self.samples,
            "train/loss": loss / finite if finite else math.nan,
            "train/lr": self.schedule.lr_at(self.step - 1),  # of the step just finished, whose index is step - 1
            "train/grad_norm": interval.grad_norm,
            "train/skipped_steps": self.faults.skipped,
            "train/broken_samples": broken,
            **{f"speed/{key}": value for key, value in speed.items()},
        }
        log.write(self.step, values)

    def _validate(self, log: MetricLog | None) -> None:
        """Validate, then write `last.safetensors` and, if these weights are the best so far, `model.safetensors`.

        Before the first step nothing is written but metrics and a picture. Collective.
        """
        self.checkpoints.wait()  # as in _save: with averaged weights, validation holds as much as a checkpoint
        metrics: dict[str, float] = {}
        task, engine, samples = self.task, self.engine, self.task.val_samples
        # Everything that needs the averaged weights in the module happens inside, on all processes.
        with evaluation_mode(engine, averaged=self.config.optim.ema > 0) as weights:
            if samples is not None:
                metrics = validate(task, engine, samples, self.plan.micro, self.world, self.faults.record_unread)
            picture = task.picture(engine.forward, self.world.device) if self.cadence.draws_at(self.step) else None
        if log and picture is not None:
            log.write_picture(self.step, picture)
        if log and metrics:
            log.write(self.step, metrics)
        is_best = self.best.update(self.step, metrics)
        self.last_metrics = metrics
        note = " (best so far)" if metrics and is_best else ""
        shown = metrics_text(metrics)
        self._print(f"step {self.step}/{self.steps}: {shown}{note}")
        self.faults.synchronise()  # the record below lists the broken files of all processes
        if self.step and weights is not None:
            self._write_weights(weights, metrics, is_best)
        self._write_record()

    def _is_stale(self) -> bool:
        return self.cadence.is_stale(self.step, self.best.value, self.best.improved_step)

    def _is_finished(self) -> bool:
        return self.step >= self.steps or (self.cadence.validates_at(self.step) and self._is_stale())

    def _write_weights(self, weights: Mapping[str, Tensor], metrics: Mapping[str, float], is_best: bool) -> None:
        """Write the model files with everything that their readers may want to know about where they come from."""
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
        """Gather a checkpoint and hand it to the thread that writes it, so that training continues meanwhile.

        Collective: the engine gathers its partitions, and the faults of all processes are merged.
        """
        self.checkpoints.wait()  # or the host would hold two: the one that is being written, and the next
        tensors = self.engine.training_state()
        faults = self.faults.state()
        self.saved = time.monotonic()
        # All collectives are done: from here on rank 0 works alone, and its writer thread in the background.
        if tensors is None:  # only rank 0 gets the tensors, and only rank 0 writes
            return
        state: dict[str, Any] = {
            "step": self.step,
            "best": self.best.value,
            "best_by": self.best_by,
            "best_step": self.best.step,
            "improved_step": self.best.improved_step,
            "configs": self._configs(),
            "faults": faults,
            "seconds": self._seconds(),
            # Compared by find_start when the run is resumed.
            "identity": self._identity(),
            "provenance": self.provenance,
            "arithmetic": arithmetic(self.world, self.config.engine.precision),
            "cpb_norm": [list(norm) for norm in self.task.encoder.cpb_norm],
        }
        self.checkpoints.save(tensors, state, step=self.step)

    def _stop(self) -> None:
        """Wait until the checkpoint is on disk, write the restart marker and raise StoppedError. Collective."""
        self.checkpoints.wait()
        if self.world.rank == 0:
            write_restart_marker(self.folder)
        # Used as a barrier: when the first process exits, the launcher ends the others, while rank 0 may still write.
        all_reduce_max(self.world, 0.0)
        raise StoppedError(
            f"{self.folder}: stopped at step {self.step} of {self.steps} by {self.signals.name or 'another process'}; "
            "the checkpoint is saved; the same command resumes the run"
        )

    def _seconds(self) -> float:
        """Wall time of this run in seconds, including the parts before interruptions."""
        return self.seconds_before + time.monotonic() - self.started

    def _identity(self) -> dict[str, object]:
        """What must not change when a run is resumed: which samples a step sees, what they mean, and the model."""
        data, model = self.task.data_facts, self.task.encoder.architecture()
        facts: dict[str, object] = {"samples": self.samples, "batch": self.plan.batch, "seed": self.config.seed}
        facts |= {key: data[key] for key in ("data_fingerprint", "classes_sha256") if key in data}
        facts |= {key: model[key] for key in MODEL_IDENTITY}
        # Lists for tuples, as in a checkpoint.
        return cast(dict[str, object], json.loads(json.dumps(facts, allow_nan=False)))

    def _configs(self) -> list[dict[str, Any]]:
        """Every configuration of this run as JSON values, oldest first, each with the step since which it held."""
        return [configuration.model_dump() for configuration in self.configs]

    def _print(self, *lines: str) -> None:
        print_on_rank_zero(self.world, terminal_lines(lines))

    def _make_engine(self) -> Engine:
        """Build the engine around the task's module, and print how batch and learning rate come about."""
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
        """The contents of run.json: what this run is, its progress, and what it has cost so far."""
        seconds = self._seconds()
        return {
            "step": self.step,
            "steps": self.steps,
            "stopped_early": self.step < self.steps and self._is_finished(),
            "best": self.best.value,
            "best_metric": self.best.metric,
            "best_step": self.best.step,
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
            "precision": computing_precision(self.config.engine.precision, self.world.device),
            "seed": self.config.seed,
            "configs": self._configs(),
            "skipped_steps": self.faults.skipped,
            "broken_files": list(self.faults.broken),
            "slowest_file": list(self.faults.slowest),
            "speed": self.throughput.overall(),
            "hours": seconds / 3600,
            "device_hours": seconds * self.world.size / 3600,
            "decoder": self.task.train_samples.decoder,
        }

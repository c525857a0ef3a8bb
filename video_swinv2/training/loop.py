"""The one training loop: images and clips, SimMIM and classification, one process and many.

A run is a folder. The same command on the same folder goes on where it stopped; everything random in it is a function
of the seed and the step, so nothing but the step, the weights and the moments is needed for that.
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
from video_swinv2.distributed.lifeline import Lifeline
from video_swinv2.distributed.world import (
    START_AGAIN,
    StopSignal,
    World,
    agree,
    mark_again,
    say,
    seed_step,
    start,
    stop,
    total,
    unmark_again,
)
from video_swinv2.engine.checkpoint import Checkpoints, Portable
from video_swinv2.engine.deepspeed import Engine, StepOutcome, make_engine
from video_swinv2.engine.foreign_checkpoints import newest_of
from video_swinv2.engine.optimizer import make_schedule, parameter_groups
from video_swinv2.engine.zero3 import sharded_construction, whole_numel
from video_swinv2.errors import UsageError, UserError
from video_swinv2.progress import Progress
from video_swinv2.training.faults import Faults, explained
from video_swinv2.training.metrics import MetricLog, Waiting, Window, check_wandb
from video_swinv2.training.record import Pace, batch_words, next_command, rate_words, table, write_record
from video_swinv2.training.tasks import Task, initialise
from video_swinv2.training.validation import measure, ready


class StoppedError(UserError):
    """The run was told to stop and saved itself; the same command goes on."""

    exit_code = START_AGAIN


def run(config: Config, make_task: Callable[[Config], Task]) -> Path:
    """Train to the last step and return the run folder; UserError or UsageError for what the user can mend.

    StoppedError is raised after SIGTERM, SIGUSR1 or SIGINT, when the checkpoint is on disk. Where one of several
    processes dies or fails, all end; its error is raised, or printed, by rank 0 alone.
    """
    world = start(config.engine.device)
    mend = f"start the same command again, it goes on from the newest checkpoint of {config.out}"
    try:
        with Lifeline(world, mend) as lifeline:
            try:
                with explained(config, world):
                    _run(config, make_task, world)
            except UserError as error:
                lifeline.fail(str(error).strip().splitlines()[-1], error.exit_code)
                raise
            except Exception:
                lifeline.wait_for_verdict()
                raise
    finally:
        gc.unfreeze()
        stop()
    return Path(config.out)


def _run(config: Config, make_task: Callable[[Config], Task], world: World) -> None:
    if config.model.attention == "flex" and world.device.type != "cuda":
        raise UsageError("model.attention: flex trains on CUDA only; choose sequential, or auto")
    check_wandb(config.wandb)
    torch.manual_seed(config.seed)  # for the fresh weights; every step seeds itself
    with StopSignal() as signals:
        with sharded_construction(config.engine, world):
            task = make_task(config)
        Run(config, task, world, signals).train()


class Run:
    """One run: its folder, model, engine, and where it stands."""

    def __init__(self, config: Config, task: Task, world: World, signals: StopSignal) -> None:
        self.config, self.task, self.world, self.signals = config, task, world, signals
        self.folder = Path(config.out)
        self.samples = len(task.train_samples)
        self.plan = plan_batch(config.optim.batch, config.optim.micro_batch, world.size, task.train_samples.repeats)
        self.steps = max(1, round(config.optim.epochs * self.samples / self.plan.batch))
        self.schedule = make_schedule(config.optim, self.steps, self.samples)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints, lambda t: say(world, t))
        self.parameters = sum(whole_numel(parameter) for parameter in task.module.parameters())
        self.step = 0
        self.best: float | None = None
        self.best_step = 0
        self.measures: dict[str, float] = {}
        self.provenance: dict[str, Any] = {}
        self.seconds_before = 0.0
        self.faults = Faults(config, world, task.train_samples)
        self.pace = Pace(task, config, world)

        found = self._find_start()
        self.engine = self._make_engine()
        if found:
            self.engine.load(found)
        self.started = self.saved = time.monotonic()

    def train(self) -> None:
        """All steps that are left."""
        if self.step >= self.steps or (self._due_for_validation() and self._is_stale()):
            say(self.world, f"{self.folder}: finished at step {self.step}; choose another out or more optim.epochs")
            return
        self._write_record()
        log = None
        if self.world.rank == 0:
            unmark_again(self.folder)
            log = MetricLog(self.folder, self.step, self.config.wandb)
        try:
            if self.step == 0:
                self._validate(log)  # it fails now rather than hours later, and tells where the run started
            self._steps(log)
        finally:
            if log:
                log.close()
            self.checkpoints.wait()
        self._write_record()
        say(self.world, table(self.folder, self._record(), self.measures))
        say(self.world, next_command(self.folder, self.config, self.task.name.startswith("SimMIM")))

    def _steps(self, log: MetricLog | None) -> None:
        samples, seed, rank = self.task.train_samples, self.config.seed, self.world.rank
        pin = self.world.device.type == "cuda"
        loader = training_loader(samples, self.plan, seed=seed, rank=rank, first=self.step, last=self.steps, pin=pin)
        waiting = Waiting()
        batches = waiting.over(loader)
        window = Window()
        self.engine.module.train()
        batch, done = self.plan.batch, self.step * self.plan.batch
        progress = Progress(self.folder.name, self.steps * batch, unit="samples", shown=rank == 0, done=done)
        with progress:
            while self.step < self.steps:
                outcome = self._one_step(batches, window)
                self.step += 1
                stopping, saving = self._agree(outcome, window)
                progress.advance(self.plan.batch, waiting.seconds, f"loss {window.last_loss:.4f}")
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    self._log(log, window, waiting.seconds)
                    window = Window(waiting.seconds)
                if self.step == 1:
                    # What lives now lives on; without this every collection walks through all of it again.
                    gc.collect()
                    gc.freeze()
                if self._due_for_validation():
                    started = time.perf_counter()
                    self._validate(log)
                    self._save()
                    window.started += time.perf_counter() - started  # its speed is that of training
                    if self._is_stale():
                        break
                elif stopping or saving:
                    self._save()
                if stopping and self.step < self.steps:
                    self._interrupt()

    def _one_step(self, batches: Iterator[Batch], window: Window) -> StepOutcome:
        self.engine.set_lr(self.schedule.lr_at(self.step))
        outcome = None
        window.inputs.clear()
        for micro in range(self.plan.accumulation):
            batch = next(batches)
            self.faults.note(batch)
            seed_step(self.config.seed, self.step, micro, self.world.rank)
            loss = self.task.loss(self.engine.forward, batch.to(self.world.device))
            self.engine.backward(loss)
            window.add(batch, loss.detach())
            outcome = self.engine.step()
        if outcome is None:
            raise RuntimeError("the engine did not end the step that the batch plan ends here")
        window.grad_norm = outcome.grad_norm
        return outcome

    def _agree(self, outcome: StepOutcome, window: Window) -> tuple[bool, bool]:
        """What all processes do after this step: whether to stop, and whether to write a checkpoint."""
        due = time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes
        fault = not outcome.applied and not outcome.rescaled
        stopping, saving, skipped = agree(self.world, float(self.signals.requested), float(due), float(fault))
        self.faults.count_step(self.step, bool(skipped), window.inputs)
        return bool(stopping), bool(saving)

    def _log(self, log: MetricLog | None, window: Window, waited: float) -> None:
        loss, micro_batches, broken = total(self.world, [window.loss_sum(), window.count, self.faults.broken_samples])
        self.faults.check_broken(int(broken), max(self.step * self.plan.batch, self.samples))
        if log is None:
            return
        samples = window.count / self.plan.accumulation * self.plan.batch
        speed = self.pace.add(samples, time.perf_counter() - window.started, waited - window.waited)
        if advice := self.pace.advice(self.faults.slowest):
            say(self.world, advice)
        values = {
            "epoch": self.step * self.plan.batch / self.samples,
            "train/loss": loss / micro_batches,
            "train/lr": self.schedule.lr_at(self.step - 1),
            "train/grad_norm": window.grad_norm,
            "train/skipped_steps": self.faults.skipped,
            "train/broken_samples": broken,
            **{f"speed/{key}": value for key, value in speed.items()},
        }
        log.write(self.step, values)

    def _due_for_validation(self) -> bool:
        return self.step == self.steps or self.step % self._validation_steps() == 0

    def _validation_steps(self) -> int:
        return max(1, round(self.config.val_epochs * self.samples / self.plan.batch))

    def _validate(self, log: MetricLog | None) -> None:
        """Measure on the whole validation split; write the last weights and, if these are, the best."""
        measures: dict[str, float] = {}
        with ready(self.engine, averaged=self.config.optim.ema > 0) as weights:
            if self.task.val_samples is not None:
                measures = measure(
                    self.task, self.engine, self.task.val_samples, self.plan.micro, self.world, self.faults.name_unread
                )
            picture = self.task.picture(self.engine.forward, self.world.device) if self._due_for_picture() else None
        if log and picture is not None:
            log.picture(self.step, picture)
        if log and measures:
            log.write(self.step, measures)
        value = measures.get(self.task.best_metric)
        better = value is None or self.best is None or (value > self.best) == self.task.higher_is_better
        if self.step and value is not None and better:
            self.best, self.best_step = value, self.step
        self.measures = measures
        note = " (best so far)" if self.step and measures and better else ""
        shown = ", ".join(f"{key} {number:.4f}" for key, number in measures.items()) or "no validation split"
        say(self.world, f"step {self.step}/{self.steps}: {shown}{note}")
        self.faults.share()
        if self.step and weights is not None:
            self._write_weights(weights, measures, better)
        self._write_record()

    def _is_stale(self) -> bool:
        """Whether the best validation is so old that the run ends early."""
        epochs = self.config.early_stop_epochs
        if epochs is None or self.best is None or self.step >= self.steps:
            return False
        return self.step - self.best_step >= epochs * self.samples / self.plan.batch

    def _write_weights(self, weights: Mapping[str, Tensor], measures: Mapping[str, float], better: bool) -> None:
        ema = self.config.optim.ema
        provenance = self.provenance | {
            "task": self.task.name,
            "step": self.step,
            "data": self.task.facts,
            "weights": f"averaged over the steps, decay {ema}" if ema else "as trained",
            **measures,
        }
        self.task.save(self.folder / "last.safetensors", weights, provenance)
        if better:
            self.task.save(self.folder / "model.safetensors", weights, provenance)

    def _due_for_picture(self) -> bool:
        """A picture belongs to every so many validations, and to the last."""
        between = (self.config.pictures_epochs or 0.0) / self.config.val_epochs
        return self.step == self.steps or self.step // self._validation_steps() % max(1, round(between)) == 0

    def _save(self) -> None:
        states = self.engine.states()
        faults = self.faults.state()
        self.saved = time.monotonic()
        if states is None:
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
        self.checkpoints.save(states, state, step=self.step)

    def _interrupt(self) -> None:
        self.checkpoints.wait()
        if self.world.rank == 0:
            mark_again(self.folder)
        agree(self.world, 0.0)  # whoever leaves first would end the writer
        raise StoppedError(
            f"{self.folder}: stopped at step {self.step} of {self.steps} by {self.signals.name or 'another process'}; "
            "the checkpoint is saved, the same command goes on"
        )

    def _seconds(self) -> float:
        """Wall time of this run, those of its interrupted parts included."""
        return self.seconds_before + time.monotonic() - self.started

    def _identity(self) -> dict[str, object]:
        """What must stay the same for a run to go on: it fixes which samples a step sees."""
        return {"samples": self.samples, "batch": self.plan.batch, "seed": self.config.seed}

    def _find_start(self) -> Portable | None:
        """Own checkpoint, else the `resume` run's, else `init`; says which."""
        found: tuple[int, Portable, Any] | None = self.checkpoints.newest()
        whose = "own checkpoint"
        if found is None and self.config.resume:
            whose = f"checkpoint of {self.config.resume}"
            found = newest_of(Path(self.config.resume))
            if found is None:
                raise UserError(f"{self.config.resume}: no checkpoint to resume from; leave resume away to use init")
        if found is None:
            text, self.provenance = initialise(self.task, self.config, self.world)
            say(self.world, text)
            return None
        self.step, portable, state = found
        if state is None:  # DeepSpeed's own: it tells of nothing but weights, moments and steps
            self.best_step, self.provenance = self.step, {"init": self.config.resume}
        else:
            self._restore(state)
        say(self.world, f"weights: {whose}, step {self.step} of {self.steps}")
        return portable

    def _restore(self, state: Mapping[str, Any]) -> None:
        then, identity = state["identity"], self._identity()
        if then != identity:
            changed = "; ".join(f"{key} {then.get(key)} then, {now} now" for key, now in identity.items())
            raise UserError(f"{self.folder}: its checkpoint belongs to other data ({changed}); choose another out")
        self.provenance, self.best, self.seconds_before = state["provenance"], state["best"], state["seconds"]
        # Checkpoints of the first version do not have these two.
        self.best_step = state.get("best_step", self.step)
        self.faults.restore(state.get("faults", {}))
        self.task.encoder.cpb_norm = state["cpb_norm"]

    def _make_engine(self) -> Engine:
        optim, engine = self.config.optim, self.config.engine
        groups = parameter_groups(
            self.task.module,
            self.task.encoder.depths,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            backbone_lr=optim.backbone_lr,
        )
        settings = engine.settings(
            accumulation=self.plan.accumulation, clip_norm=optim.clip_norm, micro_batch=self.plan.micro, ema=optim.ema
        )
        say(self.world, f"{batch_words(self.config, self.plan)}; {self.samples} samples, {self.steps} steps")
        say(self.world, f"{len(groups)} parameter groups; {rate_words(optim)}")
        betas, lr = optim.betas, self.schedule.lr_at(0)
        return make_engine(self.task.module, groups, settings, self.world, lr=lr, betas=betas, eps=optim.eps)

    def _write_record(self) -> None:
        if self.world.rank == 0:
            write_record(self.folder, self.config, self._record())

    def _record(self) -> dict[str, Any]:
        """What this run is, and what it has cost so far."""
        seconds = self._seconds()
        return {
            "step": self.step,
            "steps": self.steps,
            "stopped_early": self.step < self.steps and self._due_for_validation() and self._is_stale(),
            "best": self.best,
            "best_metric": self.task.best_metric,
            "best_step": self.best_step,
            "task": self.task.name,
            "init": self.provenance,
            "parameters": self.parameters,
            "data": self.task.facts,
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
            "speed": self.pace.so_far(),
            "hours": seconds / 3600,
            "device_hours": seconds * self.world.size / 3600,
            "decoder": "pyav",
        }

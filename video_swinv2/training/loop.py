"""The one training loop: images and clips, SimMIM and classification, one process and many.

A run is a folder. The same command on the same folder goes on where it stopped; everything random in it is a function
of the seed and the step, so nothing but the step, the weights and the moments is needed for that.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_swinv2.config import Config, to_yaml
from video_swinv2.data.datasets import Batch
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import write_json
from video_swinv2.progress import Progress
from video_swinv2.training.checkpoint import Checkpoints, Portable
from video_swinv2.training.engine import Engine, EngineSettings, StepOutcome, make_engine
from video_swinv2.training.measure import MetricLog, Waiting, Window, git_state, versions
from video_swinv2.training.optim import make_schedule, parameter_groups
from video_swinv2.training.runtime import StopSignal, World, agree, gather, say, seed_step, start, stop, total
from video_swinv2.training.sharding import sharded_construction, whole_numel
from video_swinv2.training.tasks import Task, initialise
from video_swinv2.training.validation import measure, ready

MOST_SKIPPED = 3  # steps in a row whose loss or gradient was not finite, then the run stops


class StoppedError(UserError):
    """The run was told to stop and saved itself; the same command goes on."""


def run(config: Config, make_task: Callable[[Config], Task]) -> Path:
    """Train to the last step and return the run folder; UserError or UsageError for what the user can mend.

    StoppedError is raised after SIGTERM, SIGUSR1 or SIGINT, when the checkpoint is on disk.
    """
    world = start(config.engine.device)
    try:
        if config.model.attention == "flex" and world.device.type != "cuda":
            raise UsageError("model.attention: flex trains on CUDA only; choose sequential, or auto")
        torch.manual_seed(config.seed)  # for the fresh weights; every step seeds itself
        with StopSignal() as signals:
            with sharded_construction(config.engine, world):
                task = make_task(config)
            Run(config, task, world, signals).train()
    finally:
        gc.unfreeze()
        stop()
    return Path(config.out)


class Run:
    """One run: its folder, model, engine, and where it stands."""

    def __init__(self, config: Config, task: Task, world: World, signals: StopSignal) -> None:
        self.config, self.task, self.world, self.signals = config, task, world, signals
        self.folder = Path(config.out)
        self.samples = len(task.train_samples)
        self.plan = plan_batch(config.optim.batch, config.optim.micro_batch, world.size)
        self.steps = max(1, round(config.optim.epochs * self.samples / self.plan.batch))
        self.schedule = make_schedule(config.optim, self.steps, self.samples)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints, lambda t: say(world, t))
        self.parameters = sum(whole_numel(parameter) for parameter in task.module.parameters())
        self.step = 0
        self.best: float | None = None
        self.provenance: dict[str, Any] = {}
        self.seconds_before = 0.0
        self.broken: list[str] = []
        self.broken_count = self.skipped = self.skipped_in_row = 0

        found = self._find_start()
        self.engine = self._make_engine()
        if found:
            self.engine.load(found)
        self.started = self.saved = time.monotonic()

    def train(self) -> None:
        """All steps that are left."""
        if self.step >= self.steps:
            say(self.world, f"{self.folder}: finished at step {self.step}; choose another out or more optim.epochs")
            return
        self._write_record()
        log = MetricLog(self.folder, self.step) if self.world.rank == 0 else None
        try:
            if self.step == 0:
                self._validate(log)  # it fails now rather than hours later, and tells where the run started
            self._steps(log)
        finally:
            if log:
                log.close()
            self.checkpoints.wait()
        self._write_record()

    def _steps(self, log: MetricLog | None) -> None:
        loader = training_loader(
            self.task.train_samples,
            self.plan,
            seed=self.config.seed,
            rank=self.world.rank,
            first=self.step,
            last=self.steps,
            pin=self.world.device.type == "cuda",
        )
        waiting = Waiting()
        batches = waiting.over(loader)
        window = Window()
        self.engine.module.train()
        progress = Progress(
            self.folder.name,
            self.steps * self.plan.batch,
            unit="samples",
            shown=self.world.rank == 0,
            done=self.step * self.plan.batch,
        )
        with progress:
            while self.step < self.steps:
                outcome = self._one_step(batches, window)
                self.step += 1
                stopping, saving = self._agree(outcome)
                progress.advance(self.plan.batch, waiting.seconds, f"loss {window.last_loss:.4f}")
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    self._log(log, window, waiting.seconds)
                    window = Window(waiting.seconds)
                if self.step == 1:
                    # What lives now lives on; without this every collection walks through all of it again.
                    gc.collect()
                    gc.freeze()
                if self._due_for_validation():
                    self._validate(log)
                    self._save()
                elif stopping or saving:
                    self._save()
                if stopping and self.step < self.steps:
                    self._interrupt()

    def _one_step(self, batches: Iterator[Batch], window: Window) -> StepOutcome:
        self.engine.set_lr(self.schedule.lr_at(self.step))
        outcome = None
        for micro in range(self.plan.accumulation):
            batch = next(batches)
            self.broken_count += len(batch.broken)
            self._name_broken(batch.broken, "the next sample takes its place")
            seed_step(self.config.seed, self.step, micro, self.world.rank)
            loss = self.task.loss(self.engine.forward, batch.to(self.world.device))
            self.engine.backward(loss)
            window.add(loss.detach())
            outcome = self.engine.step()
        if outcome is None:
            raise RuntimeError("the engine did not end the step that the batch plan ends here")
        window.grad_norm = outcome.grad_norm
        return outcome

    def _agree(self, outcome: StepOutcome) -> tuple[bool, bool]:
        """What all processes do after this step: whether to stop, and whether to write a checkpoint."""
        due = time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes
        stopping, saving, skipped = agree(
            self.world, float(self.signals.requested), float(due), float(not outcome.applied)
        )
        self.skipped += int(skipped)
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if self.skipped_in_row >= MOST_SKIPPED:
            raise UserError(
                f"{self.folder}: loss or gradient was not finite in {MOST_SKIPPED} steps in a row, the last is "
                f"{self.step}; the weights are those before them: lower optim.lr, or use engine.precision=fp32"
            )
        return bool(stopping), bool(saving)

    def _name_broken(self, lines: Sequence[str], consequence: str) -> None:
        """Say each broken file once; only those drawn for training count against data.max_broken."""
        for line in lines:
            if line not in self.broken:
                self.broken.append(line)
                print(f"broken: {line}; {consequence}", flush=True)

    def _log(self, log: MetricLog | None, window: Window, waited: float) -> None:
        loss, micro_batches, broken = total(self.world, [window.loss_sum(), window.count, self.broken_count])
        drawn = max(self.step * self.plan.batch, self.samples)
        if broken > self.config.data.max_broken * drawn:
            raise UserError(
                f"{self.folder}: {int(broken)} of {drawn} samples came from broken files, more than data.max_broken="
                f"{self.config.data.max_broken} allows; prepare the data set again (the files are named above)"
            )
        if log is None:
            return
        seconds = time.perf_counter() - window.started
        values = {
            "epoch": self.step * self.plan.batch / self.samples,
            "train/loss": loss / micro_batches,
            "train/lr": self.schedule.lr_at(self.step - 1),
            "train/grad_norm": window.grad_norm,
            "train/skipped_steps": self.skipped,
            "train/broken_samples": broken,
            "speed/samples_per_second": window.count / self.plan.accumulation * self.plan.batch / seconds,
            "speed/data_wait": (waited - window.waited) / seconds,
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
                    self.task, self.engine, self.task.val_samples, self.plan.micro, self.world, self._name_unread
                )
            picture = self.task.picture(self.engine.forward, self.world.device) if self._due_for_picture() else None
        if log and picture is not None:
            log.picture(self.step, picture)
        if log and measures:
            log.write(self.step, measures)
        value = measures.get(self.task.best_metric)
        better = value is None or self.best is None or (value > self.best) == self.task.higher_is_better
        if self.step and value is not None and better:
            self.best = value
        note = " (best so far)" if self.step and measures and better else ""
        shown = ", ".join(f"{key} {number:.4f}" for key, number in measures.items()) or "no validation split"
        say(self.world, f"step {self.step}/{self.steps}: {shown}{note}")
        self.broken = sorted({line for lines in gather(self.world, self.broken) for line in lines})
        if self.step and weights is not None:
            self._write_weights(weights, measures, better)
        self._write_record()

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

    def _name_unread(self, lines: Sequence[str]) -> None:
        self._name_broken(lines, "it does not count as a right answer")

    def _due_for_picture(self) -> bool:
        """A picture belongs to every so many validations, and to the last."""
        between = (self.config.pictures_epochs or 0.0) / self.config.val_epochs
        return self.step == self.steps or self.step // self._validation_steps() % max(1, round(between)) == 0

    def _save(self) -> None:
        states = self.engine.states()
        self.saved = time.monotonic()
        if states is None:
            return
        state: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
            "skipped": self.skipped,
            "seconds": self._seconds(),
            "identity": self._identity(),
            "provenance": self.provenance,
            "cpb_norm": [list(norm) for norm in self.task.encoder.cpb_norm],
        }
        self.checkpoints.save(states, state, step=self.step)

    def _interrupt(self) -> None:
        self.checkpoints.wait()
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
        found, whose = self.checkpoints.newest(), "own checkpoint"
        if found is None and self.config.resume:
            whose = f"checkpoint of {self.config.resume}"
            found = Checkpoints(Path(self.config.resume) / "checkpoints").newest()
            if found is None:
                raise UserError(f"{self.config.resume}: no checkpoint to resume from; leave resume away to use init")
        if found is None:
            text, self.provenance = initialise(self.task, self.config, self.world)
            say(self.world, text)
            return None
        step, portable, state = found
        self.provenance = dict(state["provenance"])  # type: ignore[arg-type]
        identity = self._identity()
        then: dict[str, Any] = state["identity"]  # type: ignore[assignment]
        if then != identity:
            changed = "; ".join(f"{key} {then.get(key)} then, {now} now" for key, now in identity.items())
            raise UserError(f"{self.folder}: its checkpoint belongs to other data ({changed}); choose another out")
        self.step, self.best = step, state["best"]  # type: ignore[assignment]
        self.skipped = int(state["skipped"])  # type: ignore[arg-type]
        self.seconds_before = float(state["seconds"])  # type: ignore[arg-type]
        self.task.encoder.cpb_norm = state["cpb_norm"]  # type: ignore[assignment]
        say(self.world, f"weights: {whose}, step {step} of {self.steps}")
        return portable

    def _make_engine(self) -> Engine:
        optim, engine = self.config.optim, self.config.engine
        groups = parameter_groups(
            self.task.module,
            self.task.encoder.depths,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
        )
        settings = EngineSettings(
            engine=engine.engine,
            zero_stage=engine.zero_stage,
            precision=engine.precision,
            accumulation=self.plan.accumulation,
            clip_norm=optim.clip_norm,
            micro_batch=self.plan.micro,
            ema=optim.ema,
        )
        say(
            self.world,
            f"batch: {self.plan.batch} = {self.world.size} processes x {self.plan.micro} samples x "
            f"{self.plan.accumulation} accumulated; {self.samples} samples, {self.steps} steps, "
            f"{len(groups)} parameter groups",
        )
        betas, lr = optim.betas, self.schedule.lr_at(0)
        return make_engine(self.task.module, groups, settings, self.world, lr=lr, betas=betas, eps=optim.eps)

    def _write_record(self) -> None:
        """config.yaml and run.json: what this run is, and what it has cost so far."""
        if self.world.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        seconds = self._seconds()
        record = {
            "step": self.step,
            "steps": self.steps,
            "best": self.best,
            "best_metric": self.task.best_metric,
            "task": self.task.name,
            "init": self.provenance,
            "parameters": self.parameters,
            "data": self.task.facts,
            "batch": self.plan.batch,
            "processes": self.world.size,
            "micro_batch": self.plan.micro,
            "accumulation": self.plan.accumulation,
            "device": str(self.world.device),
            "seed": self.config.seed,
            "skipped_steps": self.skipped,
            "broken_files": self.broken,
            "hours": seconds / 3600,
            "device_hours": seconds * self.world.size / 3600,
            "decoder": "pyav",
            "git": git_state(),
            "versions": versions(),
        }
        write_json(self.folder / "run.json", record)

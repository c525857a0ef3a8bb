"""Where a run starts: at its own checkpoint, another run's checkpoint, the weights of a file, or from scratch.

Also records where the weights come from: the chain of files, and the configurations with which they were trained.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from video_swinv2.config import Change, Config, changed_settings, plain_values
from video_swinv2.distributed.agreement import wait_for_file
from video_swinv2.distributed.collectives import all_gather_objects, print_on_rank_zero
from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import Checkpoints, Counter, TrainingState
from video_swinv2.engine.foreign_checkpoints import newest_checkpoint
from video_swinv2.engine.zero3 import capture_loaded_values, is_partitioned, meta_copy, write_whole_weights
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.files import sha256
from video_swinv2.records import Record, parse_record, read_record
from video_swinv2.training.record import arithmetic, arithmetic_changes
from video_swinv2.training.tasks.base import Task
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.inflate import fill_model

Ancestor = dict[str, object]
PlanMicroBatch = Callable[[Config, int], tuple[int, str]]
"""A function from a configuration and the number of processes to `optim.micro_batch`, and where it comes from."""
OWN = "own checkpoint"
Found = tuple[int, TrainingState, Any]
"""Step, tensors and run state of a checkpoint; the run state of a foreign one is None."""


class _Faults(Record):
    """The state of `Faults`. Checkpoints of older versions lack some of its keys."""

    skipped: Counter = 0
    skipped_in_row: Counter = 0
    broken: list[str] = Field(default_factory=list)
    broken_samples: Annotated[float, Field(ge=0)] = 0
    slowest: tuple[float, str] = Field(default=(0.0, ""), strict=False)


class Configuration(Record):
    """A configuration of a run, and the number of steps that were finished before it held."""

    since_step: Counter
    config: dict[str, Any]
    """As `plain_values` gives it. It is compared and shown, never built into a `Config` again."""


class _RunState(Record, extra="ignore"):
    """The run's own part of a checkpoint. Those of older versions lack keys with a default."""

    configs: list[Configuration] = Field(default_factory=list)
    best: float | None
    best_by: dict[str, Any] = Field(default_factory=dict)
    best_step: Counter | None = None
    improved_step: Counter | None = None
    seconds: Annotated[float, Field(ge=0)]
    identity: dict[str, Any]
    provenance: dict[str, Any]
    cpb_norm: list[list[Annotated[int, Field(ge=1)]]]
    arithmetic: dict[str, str] = Field(default_factory=dict)
    faults: _Faults = Field(default_factory=_Faults)


@dataclass(frozen=True)
class Start:
    """The state in which a run starts.

    The weights of `init` are already in the model then. A checkpoint's weights are not, since the engine has to load
    them, but its log-CPB normaliser is.
    """

    step: int = 0
    """Optimizer steps that were finished before."""
    checkpoint: TrainingState | None = None
    """The tensors for the engine to load; None if the model already holds its initial weights."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the initial weights came from, for run.json and model files; see `initialise`."""
    own: bool = False
    """Whether the checkpoint is the run's own, so that this is one run and not a new one from another's weights."""
    configs: Sequence[Configuration] = ()
    """The configurations with which the checkpoint was trained, oldest first; empty if it records none."""
    best: float | None = None
    """The best validation so far, by the metric of `Best`; None before the first one."""
    best_step: int = 0
    improved_step: int = 0
    """For `Best`, as `best_step`."""
    seconds: float = 0.0
    """Wall time of the earlier, interrupted parts of the run."""
    faults: Mapping[str, Any] = field(default_factory=dict)
    """For `Faults.restore`."""


def find_start(
    task: Task,
    config: Config,
    checkpoints: Checkpoints,
    identity: Mapping[str, object],
    best_by: Mapping[str, object],
    steps: int,
    world: World,
) -> Start:
    """Find the start of a run and print it.

    The run's own newest checkpoint comes first, so that an interrupted run continues. Without one it is the newest
    checkpoint of the run that `resume` names, and without that key the weights that `init` names.

    identity: the values that must be the same in the checkpoint, or else the resumed run would not see the same
    samples at the same steps. A resumed run that computes with other rounding is told so.
    best_by: what the best validation is chosen by, as JSON values by name: its metric and its samples. One that was the
    best by something else does not count.
    steps: the length of the whole run, for the printed line.

    Rank 0 looks for the checkpoint, and all others read the one that it has found. Collective. Raises UserError if
    there is nothing to resume from, if a process does not see the checkpoint, or if it has another identity.
    """
    whose, found = _find_checkpoint(checkpoints, config.resume, world)
    if found is None:
        description, provenance = initialise(task, config, world)
        print_on_rank_zero(world, description)
        return Start(provenance=provenance)
    step, tensors, state = found
    if state is None:
        # A universal checkpoint of DeepSpeed holds weights, moments and the step, but nothing about data and
        # validations: there is no identity to check, and the best validation is still to come.
        start = Start(step, tensors, {"init": config.resume}, best_step=step, improved_step=step)
    else:
        folder = config.out if whose == OWN else str(config.resume)
        kept = parse_record(state, _RunState, f"{folder}: checkpoint of step {step}: state", "remove that checkpoint")
        _check_identity(folder, kept.identity, identity)
        if changes := arithmetic_changes(kept.arithmetic, arithmetic(world, config.engine.precision)):
            print_on_rank_zero(world, for_terminal(changes))
        # The normaliser of log-CPB belongs to the weights, even if this config trains with another window.
        try:
            task.encoder.cpb_norm = [tuple(norm) for norm in kept.cpb_norm]
        except ValueError as error:  # another number of stages or axes
            raise UserError(f"{folder}: checkpoint of step {step}: state: {error}; remove that checkpoint") from error
        best, best_step = kept.best, step if kept.best_step is None else kept.best_step
        improved_step = best_step if kept.improved_step is None else kept.improved_step
        if best is not None and (lost := _lost_best(kept, best_by, config.out, world)):
            print_on_rank_zero(world, for_terminal(f"{lost}: the best weights are those to come"))
            best, best_step, improved_step = None, step, step
        start = Start(
            step,
            tensors,
            kept.provenance,
            own=whose == OWN,
            configs=kept.configs,
            best=best,
            best_step=best_step,
            improved_step=improved_step,
            seconds=kept.seconds,
            # Without the keys that it lacks, for which `Faults` has defaults of its own.
            faults=kept.faults.model_dump(exclude_unset=True),
        )
    print_on_rank_zero(world, for_terminal(f"weights: {whose}, step {step} of {steps}"))
    return start


class _RecordedOptim(Record, extra="ignore"):
    micro_batch: Annotated[int, Field(ge=1)] | None = None


class _RecordedConfig(Record, extra="ignore"):
    optim: _RecordedOptim


class _RunRecord(Record, extra="ignore"):
    """What run.json says about the micro-batches of the run."""

    config: _RecordedConfig


def choose_micro_batch(config: Config, plan: PlanMicroBatch, checkpoints: Checkpoints, world: World) -> Config:
    """The config with a value for `optim.micro_batch`, if it gives none: that of a resumed run, or else a planned one.

    What a step draws at random depends on its micro-batches, so only with the same value a resumed run is exact. Where
    the value comes from is printed. Collective. Raises what `plan` raises, and UserError for a damaged record.
    """
    if config.optim.micro_batch is not None:
        return config
    chosen = None
    if world.rank == 0:
        recorded, file = None, Path(config.out, "run.json")
        if checkpoints.exist() and file.is_file():
            recorded = read_record(file, _RunRecord, "remove it, or give optim.micro_batch").config.optim.micro_batch
        chosen, words = (recorded, "as before") if recorded else plan(config, world.size)
        print_on_rank_zero(world, for_terminal(f"micro_batch: {chosen} ({words}; optim.micro_batch sets another)"))
    chosen = all_gather_objects(world, chosen)[0]
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batch=chosen))


def _find_checkpoint(checkpoints: Checkpoints, resume: str | None, world: World) -> tuple[str, Found | None]:
    """The checkpoint to start from, the same on every process, and a description of whose it is. Collective."""
    others = f"checkpoint of {resume}"
    found: Found | None = None
    whose, step, digest = "", -1, ""
    if world.rank == 0:
        whose, found = OWN, checkpoints.newest()
        if found is None and resume:
            whose, found = others, newest_checkpoint(Path(resume))
            if found is None:
                raise UserError(f"{resume}: no checkpoint to resume from; omit resume to start from init")
        if found is not None:
            step = found[0]
            digest = sha256(checkpoints.record(step)) if whose == OWN else ""
    # On a network file system, processes may see different states of the folder, so only rank 0 looks for the newest.
    host = socket.gethostname()
    whose, step, digest, host = all_gather_objects(world, (whose, step, digest, host))[0]
    if world.rank == 0 or step < 0:
        return whose, found
    if whose == OWN:
        wait_for_file(checkpoints.record(step), digest, host)
        return whose, (step, *checkpoints.read(step))
    found = newest_checkpoint(Path(str(resume)))
    if found is None or found[0] != step:
        raise UserError(
            f"{resume}: process {world.rank} on {socket.gethostname()} finds {'no step' if found is None else found[0]}"
            f" there, and process 0 on {host} step {step}; the folder must be the same for all machines of the run"
        )
    return whose, found


def _lost_best(kept: _RunState, best_by: Mapping[str, object], out: str, world: World) -> str:
    """Why the best validation of a checkpoint does not count in the run that goes on; "" if it counts. Collective.

    The best weights are not in the checkpoint but in the run folder, which lacks them if it continues another run, or
    if nothing but checkpoints was copied from there. If only better ones were written then, the run might end without
    any.
    """
    present = Path(out, "model.safetensors").is_file() if world.rank == 0 else None
    if not all_gather_objects(world, present)[0]:
        return f"the best weights so far, of step {kept.best_step}, are not in {out}"
    then = kept.best_by
    return "; ".join(f"{key} {then[key]} then, {now} now" for key, now in best_by.items() if then.get(key, now) != now)


def continue_history(start: Start, config: Config, accept_changes: bool) -> tuple[list[Configuration], list[Change]]:
    """The configurations of a run from its first step on, oldest first, and what has changed since the checkpoint.

    Raises UsageError if something has changed that affects what the model learns, unless that is accepted. A run that
    starts from the checkpoint of another run may change everything.
    """
    now = Configuration(since_step=start.step, config=plain_values(config))
    if not start.configs:
        return [now], []
    changes = changed_settings(start.configs[-1].config, now.config)
    learning = [str(change) for change in changes if change.changes_learning]
    if learning and start.own and not accept_changes:
        raise UsageError(
            f"{config.out}: has a checkpoint of step {start.step}, and what has changed since affects what is learned: "
            f"{', '.join(learning)}; undo them, add --accept-changes, or choose another out"
        )
    return [*start.configs, now] if changes else list(start.configs), changes


def _check_identity(folder: str, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise UserError naming what has changed since a checkpoint was written.

    Checkpoints of older versions record fewer values; those that are absent are not compared.
    """
    changed = [f"{key} {then[key]} then, {now[key]} now" for key in now if key in then and then[key] != now[key]]
    if changed:
        raise UserError(
            f"{folder}: its checkpoint was written with other data or another model ({'; '.join(changed)}); undo the "
            "change, or choose another out"
        )


def initialise(task: Task, config: Config, world: World) -> tuple[str, dict[str, object]]:
    """Fill the model with the weights that `init` names; with `scratch` the model keeps its random ones.

    Returns a description to print and the provenance to record. Collective under ZeRO-3. Raises UserError or UsageError
    naming whatever does not fit.
    """
    if config.init == "scratch":
        return "weights: from scratch", {"init": "scratch"}
    # Under ZeRO-3 no process holds whole parameters, so there are no shapes to check against and nothing to write to. A
    # copy on the meta device, which has shapes but no memory, stands in for the encoder: `fill_model` checks and
    # inflates as usual, a hook captures the values that it loads, and `write_whole_weights` writes them into the
    # partitioned encoder, one parameter at a time.
    partitioned = is_partitioned(task.encoder)
    target = meta_copy(task.encoder) if partitioned else task.encoder
    values = capture_loaded_values(target) if partitioned else {}
    checkpoint = read_checkpoint(config.init)
    account = fill_model(
        target,
        checkpoint,
        classes=task.classes,
        cpb_norm=config.init_cpb_norm,
        time_noise=config.init_time_noise,
        seed=config.seed,
    )
    if partitioned:
        # `fill_model` has set the normaliser of the copy only.
        write_whole_weights(task.encoder, values, world)
        task.encoder.cpb_norm = target.cpb_norm
    # Hashing reads the files once more, and they may be large, so only rank 0 does it, which writes the record.
    digests = {file.name: sha256(file) for file in checkpoint.source.files} if world.rank == 0 else {}
    return str(account), {
        "init": config.init,
        "layout": account.layout,
        "init_time_noise": config.init_time_noise,
        "ancestors": ancestors_of(config.init, digests, account.provenance),
    }


class _Provenance(Record, extra="ignore"):
    """What a model file records about the files that it comes from."""

    converted_from: str | None = None
    sha256: dict[str, str] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    ancestors: list[dict[str, Any]] = Field(default_factory=list)


def ancestors_of(file: str, digests: Mapping[str, str], provenance: Mapping[str, Any]) -> list[Ancestor]:
    """The chain of files that the weights of `file` come from, nearest first.

    Each entry has the keys ``file task steps data sha256``.

    digests: the sha256 of each of the checkpoint's files by name. If there is only one, its digest is recorded alone.
    provenance: what the file records about itself. Values that it does not record are None in the chain; released
    checkpoints record nothing. A converted file names the file that it was converted from, which comes next.
    """
    # A conversion is an entry of its own. The original's digests and provenance are stored in the converted file.
    known = parse_record(provenance, _Provenance, f"{file}: provenance")
    this: Ancestor = {
        "file": file,
        "task": "conversion" if known.converted_from else provenance.get("task"),
        "steps": provenance.get("step"),
        "data": provenance.get("data"),
        "sha256": next(iter(digests.values())) if len(digests) == 1 else dict(digests),
    }
    if known.converted_from:
        return [this, *ancestors_of(known.converted_from, known.sha256, known.provenance)]
    return [this, *known.ancestors]

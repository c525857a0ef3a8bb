"""Where a run starts: its own checkpoint, another run's, a file's weights, or scratch; and where those came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_swinv2.config import Config
from video_swinv2.distributed.collectives import print_on_rank_zero
from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.engine.foreign_checkpoints import newest_checkpoint
from video_swinv2.engine.zero3 import capture_loaded_values, is_partitioned, meta_copy, write_whole_weights
from video_swinv2.errors import UserError
from video_swinv2.files import sha256
from video_swinv2.training.tasks.base import Task
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.inflate import fill_model

Ancestor = dict[str, object]


@dataclass(frozen=True)
class Start:
    """Where a run starts, once the weights of `init` or the normaliser of a checkpoint are in the model."""

    step: int = 0
    """Optimizer steps that lie behind."""
    checkpoint: TrainingState | None = None
    """The tensors for the engine to load; None if the model holds its weights already."""
    provenance: dict[str, Any] = field(default_factory=dict)
    best: float | None = None
    """The best validation so far, by the task's `best_metric`."""
    best_step: int = 0
    seconds: float = 0.0
    """Wall time that the interrupted parts of the run have taken."""
    faults: Mapping[str, Any] = field(default_factory=dict)


def find_start(
    task: Task, config: Config, checkpoints: Checkpoints, identity: Mapping[str, object], steps: int, world: World
) -> Start:
    """The run's own newest checkpoint, else the newest of the run named by `resume`, else `init`; prints which.

    steps: the length of the whole run, for that line.
    identity: what must be the same in the checkpoint for a resumed run to see the same samples at the same steps.
    Every rank reads the same files, so all of them find the same start. Collective under ZeRO-3.
    """
    found: tuple[int, TrainingState, Any] | None = checkpoints.newest()
    whose = "own checkpoint"
    if found is None and config.resume:
        whose = f"checkpoint of {config.resume}"
        found = newest_checkpoint(Path(config.resume))
        if found is None:
            raise UserError(f"{config.resume}: no checkpoint to resume from; omit resume to start from init")
    if found is None:
        description, provenance = initialise(task, config, world)
        print_on_rank_zero(world, description)
        return Start(provenance=provenance)
    step, tensors, state = found
    if state is None:
        # DeepSpeed's own format records weights, moments and steps, but nothing about the data or the validations.
        start = Start(step, tensors, {"init": config.resume}, best_step=step)
    else:
        _check_identity(config.out, state["identity"], identity)
        # The normaliser of the position bias belongs to the weights, whatever window this config trains with.
        task.encoder.cpb_norm = state["cpb_norm"]
        start = Start(
            step,
            tensors,
            state["provenance"],
            best=state["best"],
            # Checkpoints of the first version lack `best_step` and `faults`.
            best_step=state.get("best_step", step),
            seconds=state["seconds"],
            faults=state.get("faults", {}),
        )
    print_on_rank_zero(world, f"weights: {whose}, step {step} of {steps}")
    return start


def _check_identity(folder: str, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise UserError if a checkpoint was written with other data, batch or seed."""
    if then != now:
        changed = "; ".join(f"{key} {then.get(key)} then, {value} now" for key, value in now.items())
        raise UserError(f"{folder}: its checkpoint belongs to other data ({changed}); choose another out")


def initialise(task: Task, config: Config, world: World) -> tuple[str, dict[str, object]]:
    """Fill the model as `init` asks. Returns a description to print and the provenance to record.

    Collective under ZeRO-3. Raises UserError or UsageError naming what does not fit.
    """
    if config.init == "scratch":
        return "weights: from scratch", {"init": "scratch"}
    # Under ZeRO-3 the encoder holds no whole tensor to compare shapes with or to write to. A twin on the meta device
    # stands in: `fill` checks and inflates as usual, a hook keeps what it would have loaded, and each parameter is
    # then written into the partitioned module on its own.
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
        write_whole_weights(task.encoder, values, world)
        task.encoder.cpb_norm = target.cpb_norm
    # Hashing reads the files a second time, and they may be large: only rank 0, which writes the record, does it.
    digests = {file.name: sha256(file) for file in checkpoint.source.files} if world.rank == 0 else {}
    return str(account), {
        "init": config.init,
        "layout": account.layout,
        "init_time_noise": config.init_time_noise,
        "ancestors": ancestors_of(config.init, digests, account.provenance),
    }


def ancestors_of(file: str, digests: Mapping[str, str], provenance: Mapping[str, Any]) -> list[Ancestor]:
    """The chain of files behind `init`, nearest first, each with the keys ``file task steps data sha256``.

    digests: sha256 of each of the checkpoint's files by name; if there is only one, its bare digest is recorded.
    provenance: what the file records about itself. What it does not record is None in the chain: released checkpoints
    record nothing. A converted file also names the file that it was converted from.
    """
    converted = provenance.get("converted_from")
    this: Ancestor = {
        "file": file,
        "task": "conversion" if converted else provenance.get("task"),
        "steps": provenance.get("step"),
        "data": provenance.get("data"),
        "sha256": next(iter(digests.values())) if len(digests) == 1 else dict(digests),
    }
    if converted:
        return [this, *ancestors_of(str(converted), provenance["sha256"], provenance["provenance"])]
    return [this, *provenance.get("ancestors", ())]

"""Checkpoints: whole weights and moments by parameter name, independent of ZeRO stage, world size and DeepSpeed.

A checkpoint is a folder ``step-000123`` of safetensors files, and of ``state.json``, which records the size and sha256
of each of them. It is complete or absent, never half written, whenever the process is killed:

1. all files are written into ``step-000123.tmp``, each synced to disk; ``state.json`` comes last,
2. the folder itself is synced, so that its entries are on disk too,
3. one rename gives it its final name, which file systems do atomically,
4. the parent folder is synced, and only then are older checkpoints removed.

A kill before 3 leaves a ``.tmp`` folder, which no reader looks at and the next save removes. What a disk damages later
is found by the hashes, and the next older checkpoint is used.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import sha256, sync_to_disk

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

FORMAT = 1
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"step-\d{6,}\.tmp")


@dataclass(frozen=True)
class TrainingState:
    """Everything of a training run that cannot be recomputed: whole CPU tensors by name, the same for every engine."""

    weights: dict[str, Tensor]
    """Parameters and buffers; fp32 if floating-point."""
    exp_avg: dict[str, Tensor]
    """Adam's first moments of the trained parameters, fp32."""
    exp_avg_sq: dict[str, Tensor]
    """Adam's second moments of the trained parameters, fp32."""
    optimizer_step: int
    """Adam's count of applied steps, which skipped steps do not increase."""
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Averaged weights of the trained parameters, fp32; empty if none are kept."""
    loss_scale: tuple[float, int] | None = None
    """The fp16 loss scale, and for how many steps it has held; None in other precisions."""


class Checkpoints:
    """A run's ``checkpoints`` folder: saves in a background thread, keeps the newest few, finds the newest.

    Only rank 0 saves; every rank may read. ``report`` is called with a line for each damaged checkpoint that is
    skipped.
    """

    def __init__(self, folder: Path, keep: int = 2, report: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise UsageError(f"keep_checkpoints: {keep} would keep none; use 1 or more")
        self.folder = folder
        self.keep = keep
        self._report = report
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainingState, run_state: Mapping[str, JSON], *, step: int) -> None:
        """Hand a checkpoint to the writer thread, after waiting for the one before it; raises that one's UserError.

        The tensors of ``state`` must not change afterwards (``engine.training_state()`` returns copies). If there is a
        complete checkpoint of the same step, it is kept and nothing is written.
        """
        self.wait()
        # Serialised here and not in the thread: the caller may change its dict, and should see the error if it put in
        # a value that JSON cannot represent.
        text = json.dumps(run_state)
        # Not a daemon, so that the checkpoint is completed even if the program ends with an error elsewhere.
        self._writer = threading.Thread(target=self._write, args=(state, text, step), name="checkpoint-writer")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is on disk; raises UserError naming the folder if it could not be written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def newest(self) -> tuple[int, TrainingState, dict[str, JSON]] | None:
        """Step, training state and run state of the newest undamaged checkpoint; None if the run has none yet.

        Every file is compared with its recorded size and sha256. A damaged checkpoint is reported and skipped. If all
        are damaged, UserError is raised, because starting over is for the user to decide. Changes nothing on disk, so
        any rank, and any other run, may call this.
        """
        self.wait()
        present = self._folders(_NAME)
        for path in reversed(present):
            try:
                state, run_state = _read(path)
            except UserError as error:
                self._report(f"skipped a damaged checkpoint: {error}")
            else:
                return _step_of(path), state, run_state
        if present:
            raise UserError(f"{self.folder}: all {len(present)} checkpoints are damaged; remove them to start over")
        return None

    def read(self, step: int) -> tuple[TrainingState, dict[str, JSON]]:
        """Training state and run state of one step, verified; raises UserError if it is absent or damaged."""
        return _read(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step_of)

    def _write(self, state: TrainingState, run_state: str, step: int) -> None:
        final = self._path(step)
        partial = final.with_suffix(".tmp")
        try:
            if final.exists() and _is_undamaged(final):
                return
            for leftover in self._folders(_LEFTOVER):
                # Left by a killed run. Removed before writing, because it takes as much space as this checkpoint.
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
            _write_files(partial, state, run_state, step)
            if final.exists():  # damaged, or it would have been kept above
                shutil.rmtree(final)
            partial.rename(final)
            sync_to_disk(self.folder)
            self._prune(step)
        except (OSError, SafetensorError) as error:  # a full disk raises either
            shutil.rmtree(partial, ignore_errors=True)
            self._error = UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error}); free space or fix "
                "the folder, then start again: training resumes from the previous checkpoint"
            )
            self._error.__cause__ = error
        except Exception as error:  # a bug rather than the disk; it must not vanish with the thread
            self._error = error

    def _prune(self, newest: int) -> None:
        """Remove all but the newest ``keep``, counting back from the one just written.

        Checkpoints of later steps do not count: the run has resumed from an earlier one because they are damaged.
        """
        older = [path for path in self._folders(_NAME) if _step_of(path) <= newest]
        for path in older[: -self.keep]:
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".tmp"))


def _write_files(folder: Path, state: TrainingState, run_state: str, step: int) -> None:
    moments = {f"exp_avg.{name}": tensor for name, tensor in state.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": tensor for name, tensor in state.exp_avg_sq.items()}
    contents = {"weights.safetensors": state.weights, "optimizer.safetensors": moments}
    if state.ema:
        contents["ema.safetensors"] = state.ema
    files = {}
    for name, tensors in contents.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        # safetensors creates files that only their owner can read. The folder has the mode that the user's umask gives.
        (folder / name).chmod(folder.stat().st_mode & 0o666)
        sync_to_disk(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    record = {
        "format": FORMAT,
        "step": step,
        "optimizer_step": state.optimizer_step,
        "loss_scale": state.loss_scale,
        "files": files,
        "state": json.loads(run_state),
    }
    (folder / STATE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sync_to_disk(folder / STATE_FILE)
    sync_to_disk(folder)


def _read(folder: Path) -> tuple[TrainingState, dict[str, JSON]]:
    record = _verified_record(folder)
    moments = load_file(folder / "optimizer.safetensors")
    scale = record.get("loss_scale")  # absent in checkpoints written before fp16 was supported
    state = TrainingState(
        weights=load_file(folder / "weights.safetensors"),
        exp_avg=_with_prefix(moments, "exp_avg."),
        exp_avg_sq=_with_prefix(moments, "exp_avg_sq."),
        optimizer_step=int(record["optimizer_step"]),
        ema=load_file(folder / "ema.safetensors") if "ema.safetensors" in record["files"] else {},
        loss_scale=(float(scale[0]), int(scale[1])) if scale else None,
    )
    return state, cast(dict[str, JSON], record["state"])


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_undamaged(folder: Path) -> bool:
    try:
        _verified_record(folder)
    except UserError:
        return False
    return True


def _verified_record(folder: Path) -> dict[str, Any]:
    """The parsed state.json, with size and hash of every file in it verified; raises UserError naming a damaged one."""
    path = folder / STATE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        format_number = record["format"]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        complete = {"step", "optimizer_step", "state"} <= record.keys() and "weights.safetensors" in files
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the checkpoint is incomplete") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: truncated, or not a checkpoint record") from error
    if format_number != FORMAT:
        raise UserError(
            f"{path}: format {format_number}, but this version reads {FORMAT}; use the version that wrote it"
        )
    if not complete:
        raise UserError(f"{path}: not a checkpoint record")
    for name, (size, digest) in files.items():
        _verify_file(folder / name, size, digest)
    return cast(dict[str, Any], record)


def _verify_file(path: Path, size: int, digest: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path}: has {found} bytes instead of the {size} recorded")
        if sha256(path) != digest:
            raise UserError(f"{path}: the content does not match the recorded sha256")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error

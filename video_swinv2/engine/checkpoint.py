"""Checkpoints: whole weights and moments by parameter name, independent of ZeRO stage, world size and DeepSpeed.

A checkpoint is a folder such as ``step-000123``. It contains safetensors files and ``state.json``, which records the
size and sha256 of each of them. The folder is either complete or absent, whenever the process is killed, because it is
written in four steps:

1. All files are written into ``step-000123.tmp``, and each is synced to disk; ``state.json`` comes last.
2. The folder is synced, so that the names of the files are on disk too.
3. The folder is renamed to its final name, which file systems do atomically.
4. The parent folder is synced, and only then are older checkpoints removed.

If the process is killed before step 3, it leaves a ``.tmp`` folder, which no reader looks at and the next save removes.
If the disk damages a file later, the hash reveals it when the checkpoint is read, and the run resumes from the one
before.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import json_text, path_under, sha256, sync_to_disk
from video_swinv2.records import Record, parse_record, read_json
from video_swinv2.weights.store import read_tensors

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

# Increased when older versions of this program could no longer read what is written.
FORMAT = 1
STATE_FILE = "state.json"
WEIGHTS, MOMENTS, EMA = "weights.safetensors", "optimizer.safetensors", "ema.safetensors"
_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"step-\d{6,}\.tmp")


@dataclass(frozen=True)
class TrainingState:
    """The tensors and counters of a run that cannot be recomputed: whole CPU tensors by name, whatever the engine."""

    weights: dict[str, Tensor]
    """All parameters, frozen ones included, and persistent buffers; fp32 if floating-point."""
    exp_avg: dict[str, Tensor]
    """Adam's first moments of the trained parameters, fp32."""
    exp_avg_sq: dict[str, Tensor]
    """Adam's second moments of the trained parameters, fp32."""
    optimizer_step: int
    """Adam's own step count, for its bias correction; skipped steps do not increase it."""
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Moving averages of the trained parameters, fp32; empty if none are kept."""
    loss_scale: tuple[float, int] | None = None
    """The fp16 loss scale and the number of applied steps since it last changed; None in other precisions."""


Counter = Annotated[int, Field(ge=0)]


class _File(Record):
    bytes: Counter
    sha256: str


class _StateFile(Record, extra="ignore"):
    """The content of state.json. `loss_scale` is absent in checkpoints written before fp16 was supported."""

    format: int
    step: Counter
    optimizer_step: Counter
    loss_scale: tuple[Annotated[float, Field(gt=0)], Counter] | None = Field(default=None, strict=False)
    files: dict[str, _File]
    state: dict[str, Any]


class Checkpoints:
    """A run's ``checkpoints`` folder: saves in a background thread, keeps the newest ``keep``, finds the newest.

    Only rank 0 may save; every rank may read. ``report`` is called with one line for each damaged checkpoint that
    `newest` skips.
    """

    def __init__(self, folder: Path, keep: int = 2, report: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise UsageError(f"keep_checkpoints: {keep} would keep none; use 1 or more")
        self.folder = folder
        self.keep = keep
        self._report = report
        self._writer: threading.Thread | None = None
        # What the writer thread failed with. An exception in a thread reaches nobody, so `wait` raises it later.
        self._error: Exception | None = None

    def save(self, state: TrainingState, run_state: Mapping[str, JSON], *, step: int) -> None:
        """Start writing a checkpoint in the background, after waiting for the previous one to be on disk.

        The tensors of ``state`` must not change afterwards (``engine.training_state()`` returns copies). If a complete
        checkpoint of the same step exists, it is kept and nothing is written. Raises UserError if the previous
        checkpoint could not be written.
        """
        self.wait()
        # Serialised here rather than in the thread, because the caller may change its dict afterwards, and because a
        # value that JSON cannot represent should raise in the caller.
        text = json_text(run_state)
        # Not a daemon: Python then waits for the checkpoint to be written even if the main thread ends with an error.
        self._writer = threading.Thread(target=self._write, args=(state, text, step), name="checkpoint-writer")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises UserError naming the folder if it could not be written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            # Cleared first, so that one failure is raised once and the next save can try again.
            error, self._error = self._error, None
            raise error

    def exist(self) -> bool:
        """Whether the run has a checkpoint, be it damaged."""
        return bool(self._folders(_NAME))

    def newest(self) -> tuple[int, TrainingState, dict[str, JSON]] | None:
        """Step, training state and run state of the newest undamaged checkpoint; None if the run has none yet.

        The size and sha256 of every file are compared with those recorded. Damaged checkpoints are reported and
        skipped. If all of them are damaged, UserError is raised, because whether to start over is the user's decision.
        Nothing on disk changes, so any rank and any other run may call this.
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

    def record(self, step: int) -> Path:
        """The file that records the size and sha256 of every file of a step's checkpoint, and so identifies it."""
        return self._path(step) / STATE_FILE

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        """The folders whose names match, oldest first. Sorted by number: from 10^6 steps on, names sort differently."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step_of)

    def _write(self, state: TrainingState, run_state: str, step: int) -> None:
        """The body of the writer thread: the four steps described at the top of this file."""
        final = self._path(step)
        partial = final.with_suffix(".tmp")
        try:
            # Writing it again could only lose it: the existing one would have to be removed first.
            if final.exists() and _is_undamaged(final):
                return
            for leftover in self._folders(_LEFTOVER):
                # Left by a killed run. Removed before writing, because it takes as much space as a whole checkpoint.
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
            _write_files(partial, state, run_state, step)
            # Damaged, or it would have been kept above. Removed because a rename cannot replace a folder with files.
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync_to_disk(self.folder)
            self._prune(step)
        except (OSError, SafetensorError) as error:  # a full disk raises one or the other
            shutil.rmtree(partial, ignore_errors=True)  # frees the space for the next attempt
            self._error = UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error}); free space or fix "
                "the folder, then start again: training resumes from the previous checkpoint"
            )
            self._error.__cause__ = error
        except Exception as error:  # a bug, not the disk; it must not vanish with the thread
            self._error = error

    def _prune(self, newest: int) -> None:
        """Remove all but the newest ``keep`` checkpoints, counted back from the one just written (step ``newest``).

        Checkpoints of later steps are neither counted nor removed: they can only exist if they are damaged and the run
        therefore resumed from an earlier one. Counting them would remove undamaged checkpoints instead.
        """
        older = [path for path in self._folders(_NAME) if _step_of(path) <= newest]
        for path in older[: -self.keep]:
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".tmp"))


def _write_files(folder: Path, state: TrainingState, run_state: str, step: int) -> None:
    """Write the safetensors files, then state.json with their sizes and hashes, each synced; then sync the folder."""
    # Both moments go into one file and are told apart by prefix: exp_avg.head.weight, exp_avg_sq.head.weight.
    moments = {f"exp_avg.{name}": tensor for name, tensor in state.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": tensor for name, tensor in state.exp_avg_sq.items()}
    contents = {WEIGHTS: state.weights, MOMENTS: moments}
    if state.ema:
        contents[EMA] = state.ema
    files = {}
    for name, tensors in contents.items():
        # save_file refuses tensors that are not contiguous.
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        # safetensors creates files that only their owner can read. The folder was created with the user's umask, so
        # the files get its mode without the execute bits.
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
    (folder / STATE_FILE).write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
    sync_to_disk(folder / STATE_FILE)
    sync_to_disk(folder)


def _read(folder: Path) -> tuple[TrainingState, dict[str, JSON]]:
    # Everything is verified before any tensor is parsed, so a damaged file is named instead of failing in safetensors.
    record = _verified_record(folder)
    moments, _ = read_tensors(folder / MOMENTS)
    state = TrainingState(
        weights=read_tensors(folder / WEIGHTS)[0],
        exp_avg=_with_prefix(moments, "exp_avg."),
        exp_avg_sq=_with_prefix(moments, "exp_avg_sq."),
        optimizer_step=record.optimizer_step,
        ema=read_tensors(folder / EMA)[0] if EMA in record.files else {},
        loss_scale=record.loss_scale,
    )
    return state, record.state


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_undamaged(folder: Path) -> bool:
    try:
        _verified_record(folder)
    except UserError:
        return False
    return True


def _verified_record(folder: Path) -> _StateFile:
    """Read state.json and verify size and hash of every file it lists; raises UserError naming a damaged one."""
    path = folder / STATE_FILE
    found = read_json(path, "the checkpoint is truncated or incomplete")
    # The format first: another one may have other keys.
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] != FORMAT:
        raise UserError(
            f"{path}: format {found['format']}, but this version reads {FORMAT}; use the version that wrote it"
        )
    where = f"{path}: not a checkpoint record"
    record = parse_record(found, _StateFile, where, "the checkpoint is damaged")
    missing = {WEIGHTS, MOMENTS} - record.files.keys()
    if missing:
        raise UserError(f"{where}: files: {min(missing)} is not listed; the checkpoint is damaged")
    for name, file in record.files.items():
        _verify_file(path_under(folder, name, f"{path}: files"), file.bytes, file.sha256)
    return record


def _verify_file(path: Path, size: int, digest: str) -> None:
    try:
        # The size first: it costs nothing, and a truncated file is the most common damage.
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path}: has {found} bytes instead of the {size} recorded")
        if sha256(path) != digest:
            raise UserError(f"{path}: the content does not match the recorded sha256")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error

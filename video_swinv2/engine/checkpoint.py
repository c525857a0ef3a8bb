"""The portable checkpoint: whole weights and moments by parameter name, written aside, synced, renamed into place.

It knows nothing of ZeRO stages, world sizes or DeepSpeed, and a kill at any moment leaves the older one whole.
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
    """All of a training run that cannot be computed again: CPU tensors by name, whole, whatever engine made them.

    ``weights`` parameters and buffers (fp32), ``exp_avg`` and ``exp_avg_sq`` Adam's moments of the trained
    parameters, ``optimizer_step`` Adam's count of applied steps, ``ema`` averaged weights where they are kept,
    ``loss_scale`` that of fp16 and how many steps it has held.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    optimizer_step: int
    ema: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: tuple[float, int] | None = None


class Checkpoints:
    """Owner of a run's ``checkpoints`` folder: writes in a background thread, keeps the newest few, finds the newest.

    Only rank 0 saves; every rank may read. ``say`` gets a line about each damaged checkpoint that is passed over.
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise UsageError(f"checkpoints.keep: {keep} would keep none; use 1 or more")
        self.folder = folder
        self.keep = keep
        self._say = say
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, portable: TrainingState, state: Mapping[str, JSON], *, step: int) -> None:
        """Hand a checkpoint to the writer thread; waits first for the one before it. Raises its UserError, if any.

        The tensors of ``portable`` must not change afterwards (``engine.states()`` returns copies). A whole checkpoint
        of the same step is left as it is.
        """
        self.wait()
        text = json.dumps(state)  # now: the caller may change its dict, and a value JSON has no form for is its bug
        # Not a daemon: when the program ends by an error elsewhere, the checkpoint is still finished.
        self._writer = threading.Thread(target=self._write, args=(portable, text, step), name="checkpoint-writer")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises UserError naming the folder if it could not be written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def newest(self) -> tuple[int, TrainingState, dict[str, JSON]] | None:
        """The step, tensors and state of the newest whole checkpoint; None where the run has none yet.

        Every file is compared with its recorded size and sha256. A damaged checkpoint is reported and passed over;
        where all are damaged UserError is raised, since to start from nothing is a decision for the user. Changes
        nothing on disk, so any rank, and another run, may call it.
        """
        self.wait()
        present = self._folders(_NAME)
        for path in reversed(present):
            try:
                portable, state = _read(path)
            except UserError as error:
                self._say(f"passed over a damaged checkpoint: {error}")
            else:
                return _step_of(path), portable, state
        if present:
            raise UserError(
                f"{self.folder}: none of its {len(present)} checkpoints is whole; remove them to start anew"
            )
        return None

    def read(self, step: int) -> tuple[TrainingState, dict[str, JSON]]:
        """The checkpoint of one step, verified; UserError if it is absent or damaged."""
        return _read(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step_of)

    def _write(self, portable: TrainingState, state: str, step: int) -> None:
        final = self._path(step)
        aside = final.with_suffix(".tmp")
        try:
            if final.exists() and _is_whole(final):
                return
            for leftover in self._folders(_LEFTOVER):
                shutil.rmtree(leftover)  # of a run that was killed; before writing, since it takes as much room
            aside.mkdir(parents=True)
            _write_files(aside, portable, state, step)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            sync_to_disk(self.folder)
            self._prune(step)
        except (OSError, SafetensorError) as error:  # either, for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            self._error = UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error}); free space or mend "
                "the folder, then start again: training resumes from the checkpoint before"
            )
            self._error.__cause__ = error
        except Exception as error:  # a bug, not the disk; it must not vanish with the thread
            self._error = error

    def _prune(self, newest: int) -> None:
        """Remove all but the newest ``keep``, counted from the one just written; later steps are damaged ones."""
        older = [path for path in self._folders(_NAME) if _step_of(path) <= newest]
        for path in older[: -self.keep]:
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".tmp"))


def _write_files(folder: Path, portable: TrainingState, state: str, step: int) -> None:
    moments = {f"exp_avg.{name}": tensor for name, tensor in portable.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": tensor for name, tensor in portable.exp_avg_sq.items()}
    contents = {"weights.safetensors": portable.weights, "optimizer.safetensors": moments}
    if portable.ema:
        contents["ema.safetensors"] = portable.ema
    files = {}
    for name, tensors in contents.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        # safetensors makes files that only their owner can read; the folder's mode carries the user's umask.
        (folder / name).chmod(folder.stat().st_mode & 0o666)
        sync_to_disk(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    record = {
        "format": FORMAT,
        "step": step,
        "optimizer_step": portable.optimizer_step,
        "loss_scale": portable.loss_scale,
        "files": files,
        "state": json.loads(state),
    }
    (folder / STATE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sync_to_disk(folder / STATE_FILE)
    sync_to_disk(folder)


def _read(folder: Path) -> tuple[TrainingState, dict[str, JSON]]:
    record = _verified_record(folder)
    moments = load_file(folder / "optimizer.safetensors")
    scale = record.get("loss_scale")  # absent in checkpoints from before fp16
    portable = TrainingState(
        weights=load_file(folder / "weights.safetensors"),
        exp_avg=_below(moments, "exp_avg."),
        exp_avg_sq=_below(moments, "exp_avg_sq."),
        optimizer_step=int(record["optimizer_step"]),
        ema=load_file(folder / "ema.safetensors") if "ema.safetensors" in record["files"] else {},
        loss_scale=(float(scale[0]), int(scale[1])) if scale else None,
    )
    return portable, cast(dict[str, JSON], record["state"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_whole(folder: Path) -> bool:
    try:
        _verified_record(folder)
    except UserError:
        return False
    return True


def _verified_record(folder: Path) -> dict[str, Any]:
    """The parsed state.json, every file it lists compared with its size and hash; UserError names what is wrong."""
    path = folder / STATE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made_by = record["format"]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        complete = {"step", "optimizer_step", "state"} <= record.keys() and "weights.safetensors" in files
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the checkpoint is not complete") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is cut off or not a checkpoint's record") from error
    if made_by != FORMAT:
        raise UserError(f"{path}: format {made_by}, and this version reads {FORMAT}; use the version that wrote it")
    if not complete:
        raise UserError(f"{path}: is not a checkpoint's record")
    for name, (size, digest) in files.items():
        _verify_file(folder / name, size, digest)
    return cast(dict[str, Any], record)


def _verify_file(path: Path, size: int, digest: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path}: has {found} bytes, not the {size} recorded")
        if sha256(path) != digest:
            raise UserError(f"{path}: its content does not match the recorded sha256")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error

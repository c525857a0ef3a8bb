"""Finds the newest checkpoint of a run, and reads DeepSpeed's universal checkpoints as if they were our own.

A universal checkpoint has whole tensors in one folder per parameter, ``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt``. Step
counts and shapes are in ``*_model_states.pt`` files next to the ``zero`` folder. All of them are pickles, which are
read without executing anything. DeepSpeed's own loader is not used: with several parameter groups it mixes up their
settings and advances Adam's step count once per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_swinv2.engine.checkpoint import JSON, Checkpoints, TrainingState
from video_swinv2.engine.zero_layout import MOMENTS
from video_swinv2.errors import UserError, first_line
from video_swinv2.records import read_bytes
from video_swinv2.weights.formats import DERIVED, PREFIXES
from video_swinv2.weights.unpickle import read_inert

MAX_POINTER_BYTES = 4096
# DeepSpeed's tool that converts its partitioned checkpoints into universal ones.
CONVERT_COMMAND = (
    "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
    " --input_folder {} --output_folder {}_universal"
)


def newest_checkpoint(folder: Path) -> tuple[int, TrainingState, dict[str, JSON] | None] | None:
    """Step, training state and run state of the newest checkpoint in a folder; None if there is none.

    The folder is a run folder or a universal checkpoint. A universal checkpoint has no run state, so that is None.
    Raises UserError for a partitioned DeepSpeed checkpoint, with the command that converts it.
    """
    universal = _universal_folder(folder)
    if universal is not None:
        return (*_read_universal(universal), None)
    return Checkpoints(folder / "checkpoints").newest()


def _universal_folder(folder: Path) -> Path | None:
    """The universal checkpoint that `folder` is or points to; None if it is no DeepSpeed checkpoint at all.

    `latest_universal` and `latest` are DeepSpeed's text files with the name of the newest checkpoint's folder.
    Raises UserError for a partitioned checkpoint.
    """
    pointer = folder / "latest_universal"
    if pointer.is_file():
        # The last part alone: the file must not lead out of the folder that the user named.
        folder = folder / _pointed_name(pointer)
    if (folder / "zero").is_dir():
        return folder
    # Not universal. If it is what DeepSpeed's save_checkpoint writes, tell the user how to convert it.
    latest = folder / "latest"
    partitioned = folder / _pointed_name(latest) if latest.is_file() else folder
    if any(partitioned.glob("*_model_states.pt")):
        command = CONVERT_COMMAND.format(partitioned, partitioned)
        raise UserError(
            f"{partitioned}: a partitioned DeepSpeed checkpoint; convert it with `{command}` and resume from "
            f"{partitioned}_universal"
        )
    return None


def _pointed_name(pointer: Path) -> str:
    """The name of the folder in one of DeepSpeed's text files."""
    text = read_bytes(pointer, MAX_POINTER_BYTES).decode("utf-8", "replace").strip()
    if not text.isprintable():
        raise UserError(f"{pointer}: holds no name of a folder; write it again")
    return Path(text).name


def _read_universal(folder: Path) -> tuple[int, TrainingState]:
    """Step and training state of a universal checkpoint. Raises UserError if it is not made like one."""
    try:
        return _read_states(folder)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # The model states are nested values of DeepSpeed's, any of which may be of another type in a damaged file.
        raise UserError(
            f"{folder}: its model states are not those of DeepSpeed ({first_line(error)}); convert again"
        ) from error


def _read_states(folder: Path) -> tuple[int, TrainingState]:
    # Any of the model_states files will do: counts, shapes and buffers are the same in all of them. The name after the
    # comma is that of ZeRO-1 and -2, for the error message if there is none.
    model_states = _mapping(next(iter(sorted(folder.glob("*_model_states.pt"))), folder / "mp_rank_00_model_states.pt"))
    shapes = _shapes(model_states)
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("fp32", *MOMENTS)}
    for path in sorted((folder / "zero").rglob("*.pt")):
        # zero/module.layers.0.norm.weight/exp_avg.pt: the folder names the parameter, the file the kind of tensor.
        # Other files (step.pt, for example) and tensors that the model computes itself are passed over.
        name = PREFIXES.sub("", path.parent.relative_to(folder / "zero").as_posix())
        if path.stem in found and not name.endswith(DERIVED):
            found[path.stem][name] = _tensor(path, shapes.get(name))
    weights = _buffers(model_states) | found["fp32"]
    if not found["exp_avg"] or found["exp_avg"].keys() != found["exp_avg_sq"].keys():
        raise UserError(
            f"{folder}: has no Adam moments, so it cannot be resumed; "
            "convert it with DeepSpeed's zero_to_fp32 and start from that with init="
        )
    state = TrainingState(weights, found["exp_avg"], found["exp_avg_sq"], _adam_steps(folder, model_states))
    return int(model_states.get("global_steps", 0)), state


def _content(path: Path) -> Any:
    try:
        return read_inert(path)
    except Exception as error:  # a damaged file can raise anything, depending on its bytes
        raise UserError(
            f"{path}: cannot be read as part of a universal checkpoint ({first_line(error)}); convert again"
        ) from error


def _mapping(path: Path) -> Mapping[str, Any]:
    """The content of a model_states file; UserError if it is something else."""
    content = _content(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: does not contain the model states of a DeepSpeed checkpoint; convert again")
    return content


def _tensor(path: Path, shape: tuple[int, ...] | None) -> Tensor:
    """The tensor in a file, in fp32 and in `shape` if that is known. DeepSpeed saves it alone or under "param"."""
    content = _content(path)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path}: contains no tensor; convert again")
    if shape is not None:
        if tensor.numel() != torch.Size(shape).numel():
            raise UserError(f"{path}: has {tensor.numel()} elements, which does not fit shape {shape}; convert again")
        tensor = tensor.view(shape)  # ZeRO-3's tensors are stored flat
    return tensor.float()


def _shapes(model_states: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained parameters by name. DeepSpeed records a list of dictionaries, one per parameter group."""
    groups = model_states.get("param_shapes") or []
    groups = groups if isinstance(groups, list) else [groups]
    # `read_inert` leaves each torch.Size as a placeholder, which has the arguments of the pickled call.
    return {PREFIXES.sub("", name): tuple(size.arguments[0]) for group in groups for name, size in group.items()}


def _buffers(model_states: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's buffers by name, which have no folder below ``zero``; without those that the model computes."""
    names = set(model_states.get("buffer_names") or [])
    module = model_states.get("module") or {}
    kept = {PREFIXES.sub("", name): tensor for name, tensor in module.items() if name in names}
    return {name: tensor for name, tensor in kept.items() if not name.endswith(DERIVED)}


def _adam_steps(folder: Path, model_states: Mapping[str, Any]) -> int:
    """Adam's own step count, which excludes skipped steps.

    It is in any `step.pt`. ZeRO-3 writes no such file, so there it is computed from DeepSpeed's counters.
    """
    for path in sorted((folder / "zero").rglob("step.pt")):
        content = _content(path)
        count = content.get("param") if isinstance(content, Mapping) else content
        if isinstance(count, (int, float, Tensor)):
            return int(count)
    return int(model_states.get("global_steps", 0)) - int(model_states.get("skipped_steps", 0))

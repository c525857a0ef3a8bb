"""Runs to go on from: our own checkpoints, and DeepSpeed's universal ones, brought into the same portable form.

A universal checkpoint holds whole tensors, one folder for each parameter: ``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt``;
counts and shapes stand in the ``*_model_states.pt`` beside them. Nothing in these pickles is executed. DeepSpeed's own
loading of them is not used: with several parameter groups it mixes up their settings and advances Adam once per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_swinv2.engine.checkpoint import JSON, Checkpoints, TrainingState
from video_swinv2.engine.zero_layout import MOMENTS
from video_swinv2.errors import UserError
from video_swinv2.weights.formats import DERIVED, PREFIXES
from video_swinv2.weights.unpickle import read_inert

CONVERT = (
    "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
    " --input_folder {} --output_folder {}_universal"
)


def newest_checkpoint(folder: Path) -> tuple[int, TrainingState, dict[str, JSON] | None] | None:
    """Step, tensors and state of a run folder's newest checkpoint, or of a universal one, whose state is None.

    None where there is neither. UserError for DeepSpeed's checkpoint in pieces, with the command that joins it.
    """
    universal = _universal_folder(folder)
    if universal is not None:
        return (*_read_universal(universal), None)
    return Checkpoints(folder / "checkpoints").newest()


def _universal_folder(folder: Path) -> Path | None:
    """The folder itself, or the one that the `latest_universal` file in it names."""
    pointer = folder / "latest_universal"
    if pointer.is_file():
        folder = folder / Path(pointer.read_text(encoding="utf-8").strip()).name
    if (folder / "zero").is_dir():
        return folder
    latest = folder / "latest"
    pieces = folder / Path(latest.read_text(encoding="utf-8").strip()).name if latest.is_file() else folder
    if any(pieces.glob("*_model_states.pt")):
        raise UserError(
            f"{pieces}: a DeepSpeed checkpoint in pieces; join them with `{CONVERT.format(pieces, pieces)}` and resume "
            f"from {pieces}_universal"
        )
    return None


def _read_universal(folder: Path) -> tuple[int, TrainingState]:
    model_states = _mapping(next(iter(sorted(folder.glob("*_model_states.pt"))), folder / "mp_rank_00_model_states.pt"))
    shapes = _shapes(model_states)
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("fp32", *MOMENTS)}
    for path in sorted((folder / "zero").rglob("*.pt")):
        name = PREFIXES.sub("", path.parent.relative_to(folder / "zero").as_posix())
        if path.stem in found and not name.endswith(DERIVED):
            found[path.stem][name] = _tensor(path, shapes.get(name))
    weights = _buffers(model_states) | found["fp32"]
    if not found["exp_avg"] or found["exp_avg"].keys() != found["exp_avg_sq"].keys():
        raise UserError(f"{folder}: holds no moments of Adam; give it as init=, which takes the weights alone")
    portable = TrainingState(weights, found["exp_avg"], found["exp_avg_sq"], _adam_steps(folder, model_states))
    return int(model_states.get("global_steps", 0)), portable


def _content(path: Path) -> Any:
    try:
        return read_inert(path)
    except Exception as error:  # the bytes of a damaged file choose what fails
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: cannot be read as a part of a universal checkpoint ({reason}); convert again"
        ) from error


def _mapping(path: Path) -> Mapping[str, Any]:
    content = _content(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not the model states of a DeepSpeed checkpoint; convert again")
    return content


def _tensor(path: Path, shape: tuple[int, ...] | None) -> Tensor:
    content = _content(path)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path}: holds no tensor; convert again")
    if shape is not None:
        if tensor.numel() != torch.Size(shape).numel():
            raise UserError(f"{path}: has {tensor.numel()} elements, not those of shape {shape}; convert again")
        tensor = tensor.view(shape)  # ZeRO-3's are stored flat
    return tensor.float()


def _shapes(model_states: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the trained parameters, which DeepSpeed writes down by group."""
    groups = model_states.get("param_shapes") or []
    groups = groups if isinstance(groups, list) else [groups]
    # torch.Size is read as a placeholder with what it would be called with.
    return {PREFIXES.sub("", name): tuple(size.arguments[0]) for group in groups for name, size in group.items()}


def _buffers(model_states: Mapping[str, Any]) -> dict[str, Tensor]:
    names = set(model_states.get("buffer_names") or [])
    module = model_states.get("module") or {}
    kept = {PREFIXES.sub("", name): tensor for name, tensor in module.items() if name in names}
    return {name: tensor for name, tensor in kept.items() if not name.endswith(DERIVED)}


def _adam_steps(folder: Path, model_states: Mapping[str, Any]) -> int:
    """Adam's own count, which is less than that of steps where some were skipped; ZeRO-3 leaves no file of it."""
    for path in sorted((folder / "zero").rglob("step.pt")):
        content = _content(path)
        count = content.get("param") if isinstance(content, Mapping) else content
        if isinstance(count, (int, float, Tensor)):
            return int(count)
    return int(model_states.get("global_steps", 0)) - int(model_states.get("skipped_steps", 0))

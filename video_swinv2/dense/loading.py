"""Loads model files of every task: classifiers, detectors and segmenters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from video_swinv2.dense.detectors import Detector, DetectorDesign
from video_swinv2.dense.segmenters import Segmenter, SegmenterDesign
from video_swinv2.dense.upernet import Norm
from video_swinv2.errors import UserError, first_line
from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2
from video_swinv2.records import Record, parse_record
from video_swinv2.weights import store
from video_swinv2.weights.store import empty_model, model_file, read_card, read_tensors

Channels = Annotated[int, Field(ge=1, le=2**14)]
Side = Annotated[int, Field(ge=1, le=2**14)]
Number = Annotated[int, Field(ge=1, le=10**5)]


class _DetectorRecord(Record):
    """`DetectorDesign` in a file. The bounds are far above any real model, but keep its cost within reason."""

    task: str
    num_classes: Number
    kind: str
    fpn_channels: Channels
    head_channels: Channels
    mask_channels: Channels
    anchor_sizes: Annotated[list[Side], Field(min_length=1, max_length=16)]
    proposals: Number
    sampled_anchors: Number
    sampled_boxes: Number
    short_side: Side
    max_side: Side


class _SegmenterRecord(Record):
    """`SegmenterDesign` in a file."""

    task: str
    num_classes: Number
    channels: Channels
    auxiliary: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    norm: Norm
    short_side: Side | None


def load_model(
    path: Path | str,
    *,
    window: IntOrPerAxis | None = None,
    frames: int | None = None,
    image_size: IntOrPerAxis | None = None,
    attention: Backend | None = None,
) -> Any:
    """Load the model of a model file, or of a folder's `model.safetensors`, in eval mode, fp32, on the CPU.

    It is a `SwinV2`, `Detector` or `Segmenter`, as the file says. The window, and of a classifier also the number of
    frames and the image size, can be changed without changing the weights, because the log-CPB normaliser is taken from
    the file. `classes` and `preprocessing` of the model are those of the file. Raises UserError if the file is missing,
    damaged, or of a SimMIM pre-training.
    """
    path = model_file(path)
    card = read_card(path)
    task = card.dense.get("task")
    if not card.dense:
        return store.load_model(path, window=window, frames=frames, image_size=image_size, attention=attention)
    if frames is not None or image_size is not None:
        raise UserError(f"{path}: a model for {task} takes images of any size; omit frames and image_size")
    tensors, _ = read_tensors(path)
    changes = {"window": window, "attention": attention}
    architecture = card.architecture | {key: value for key, value in changes.items() if value is not None}
    build = _BUILDERS.get(str(task))
    if build is None:
        raise UserError(f"{path}: its card: dense.task: unknown task {task!r}; use a version that knows it")
    try:
        # Built without memory or initial values; `assign` then makes the loaded tensors its parameters.
        with torch.device("meta"):
            model = build(empty_model(architecture, tensors), card.dense, path)
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        model.load_state_dict(floats, assign=True)
        model.classes = card.classes
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: weights and architecture do not match ({first_line(error)}); copy or write the file again"
        ) from error
    model.encoder.preprocessing = card.preprocessing
    return model.eval()


def _build_detector(encoder: SwinV2, design: Mapping[str, object], path: Path) -> Detector:
    record = parse_record(dict(design), _DetectorRecord, f"{path}: its card: dense", store.FIX)
    arguments = record.model_dump(exclude={"task"})
    return Detector(encoder, DetectorDesign(**arguments | {"anchor_sizes": tuple(record.anchor_sizes)}))


def _build_segmenter(encoder: SwinV2, design: Mapping[str, object], path: Path) -> Segmenter:
    record = parse_record(dict(design), _SegmenterRecord, f"{path}: its card: dense", store.FIX)
    return Segmenter(encoder, SegmenterDesign(**record.model_dump(exclude={"task"})))


_BUILDERS: dict[str, Callable[[SwinV2, Mapping[str, object], Path], Detector | Segmenter]] = {
    "detection": _build_detector,
    "segmentation": _build_segmenter,
}

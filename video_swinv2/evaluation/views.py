"""The views of one video, all cut from one decode. V views, T frames, H W pixels of the crop."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from video_swinv2.data.decode import VideoReader, size_for
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import Protocol, View, plan_views, short_side
from video_swinv2.weights.store import Preprocessing

FRAME_ORDERS = ("in-order", "shuffled", "reversed")


def read_views(
    path: Path,
    protocol: Protocol,
    preprocessing: Preprocessing,
    *,
    frame_order: str = "in-order",
    seed: int = 0,
    name: str | None = None,
    time_limit_seconds: float = 60.0,
) -> tuple[Tensor, tuple[View, ...]]:
    """Open a video once, decode each frame any view needs once -> uint8 (V, 3, T, H, W), for image models (V, 3, H, W).

    "shuffled" permutes the frames of a view by (seed, name, view) alone; `name` is by default the path as given.
    Raises DecodeError for a video that cannot be read and UsageError for an unknown frame order.
    """
    with VideoReader(path, time_limit_seconds=time_limit_seconds) as reader:
        pixels, views = cut_views(
            reader, protocol, preprocessing, frame_order=frame_order, seed=seed, name=name or str(path)
        )
    return pixels, views


def cut_views(
    reader: VideoReader,
    protocol: Protocol,
    preprocessing: Preprocessing,
    *,
    frame_order: str,
    seed: int,
    name: str,
) -> tuple[Tensor, tuple[View, ...]]:
    """The same for a reader that is open, by one call of its `frames`."""
    frames, stride = clip_length(preprocessing)
    side = short_side(*reader.size, preprocessing.image_size, protocol.resize)
    shown = size_for(reader.size, side)
    views = plan_views(protocol, len(reader), *shown, frames, stride, preprocessing.image_size)
    views = tuple(_reorder(view, frame_order, seed, name, place) for place, view in enumerate(views))
    needed = sorted({index for view in views for index in view.indices})
    pictures = reader.frames(needed, short_side=side)
    pixels = torch.empty((len(views), 3, frames, *preprocessing.image_size), dtype=torch.uint8)
    for view, clip in zip(views, pixels, strict=True):
        top, left, height, width = view.box
        rows = torch.from_numpy(np.searchsorted(needed, view.indices))
        clip.copy_(pictures[:, :, top : top + height, left : left + width][rows].transpose(0, 1))
    return (pixels if preprocessing.frames is not None else pixels.squeeze(2)), views


def cut_image(picture: Tensor, protocol: Protocol, preprocessing: Preprocessing) -> tuple[Tensor, tuple[View, ...]]:
    """The views of a still, uint8 (3, H, W) -> uint8 (V, 3, H, W); its one moment is every clip's.

    Resized bicubically with antialiasing, as Microsoft's ImageNet evaluation does (data/build.py of Swin-Transformer).
    """
    height, width = picture.shape[-2:]
    shown = size_for((height, width), short_side(height, width, preprocessing.image_size, protocol.resize))
    resized = functional.interpolate(picture[None], size=shown, mode="bicubic", antialias=True)[0]
    views = plan_views(protocol, 1, *shown, 1, 1, preprocessing.image_size)
    crops = [
        resized[:, top : top + height, left : left + width] for top, left, height, width in (view.box for view in views)
    ]
    return torch.stack(crops), views


def clip_length(preprocessing: Preprocessing) -> tuple[int, int]:
    """(frames, stride) of a clip; an image model looks at single frames."""
    return (1, 1) if preprocessing.frames is None else (preprocessing.frames, preprocessing.frame_stride)


def pixels_shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Shape of one view's pixels: (3, T, H, W), for image models (3, H, W)."""
    time = () if preprocessing.frames is None else (preprocessing.frames,)
    return (3, *time, *preprocessing.image_size)


def _reorder(view: View, frame_order: str, seed: int, name: str, place: int) -> View:
    """The view with its frames in the order asked for; the order of one view depends on nothing but its arguments."""
    if frame_order == "in-order":
        return view
    if frame_order == "reversed":
        return View(view.start, view.indices[::-1], view.box)
    if frame_order != "shuffled":
        raise UsageError(f"frame_order: {frame_order!r} is not known; use one of {', '.join(FRAME_ORDERS)}")
    words = np.frombuffer(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), dtype="<u4")
    order = np.random.default_rng((seed, place, *words.tolist())).permutation(len(view.indices))
    return View(view.start, tuple(view.indices[i] for i in order), view.box)

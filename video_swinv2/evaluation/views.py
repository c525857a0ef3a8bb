"""The pixels of a video's views, all cut from a single decode of the video.

Letters: V views, T frames, H W pixels of the crop.

The views of a video share most of their frames: 4 clips x 3 crops of 32 frames show 384 frames, of which at most 128
are different. So each video is opened once and decoded forwards once. Each frame that any view shows is resized once
(for each size that the protocols ask for), and its crops are copied to every (view, position in the clip) showing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from video_swinv2.data.decode import VideoReader
from video_swinv2.data.display import size_for
from video_swinv2.data.images import read_image
from video_swinv2.data.media import IMAGE, media_type_of
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.placement import resized_short_side
from video_swinv2.evaluation.protocols import Protocol, View, plan_views, protocol_for_images
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
    """The views of one video file: uint8 (V, 3, T, H, W), or (V, 3, H, W) for image models, and where each view lies.

    The frame order "shuffled" permutes the frames of each view; the permutation depends only on the seed, the name and
    the number of the view. `name` defaults to the path. Raises DecodeError for a video that cannot be read, and
    UsageError for an unknown frame order.
    """
    with VideoReader(path, time_limit_seconds=time_limit_seconds) as reader:
        pixels, views, _ = cut_views(
            reader, (protocol,), preprocessing, frame_order=frame_order, seed=seed, name=name or str(path)
        )
    return pixels, views


def cut_views(
    reader: VideoReader,
    protocols: Sequence[Protocol],
    preprocessing: Preprocessing,
    *,
    frame_order: str,
    seed: int,
    name: str,
) -> tuple[Tensor, tuple[View, ...], int]:
    """`read_views` for an open reader and several protocols: all views of the first protocol, then of the second, ...

    Only crops are kept in memory, never whole frames. Also returns how many damaged frames were replaced by a
    neighbour. Raises as `read_views` does.
    """
    frames, stride = clip_frames_and_stride(preprocessing)
    views: list[View] = []
    # First invert the plan: for each frame of the video, collect every (view, position in the clip, short side in
    # pixels) that shows it. If a short video is looped, one frame is shown at several positions of the same view.
    uses: dict[int, list[tuple[int, int, int]]] = {}
    for protocol in protocols:
        side = resized_short_side(*reader.size, preprocessing.image_size, protocol.resize)
        shown = size_for(reader.size, side)
        plan = plan_views(protocol, len(reader), *shown, frames, stride, preprocessing.image_size, reader.fps)
        # `number` counts within the protocol, so that shuffling does not depend on what else is tested with it.
        for number, view in enumerate(plan):
            ordered = _reorder(view, frame_order, seed, name, number)
            for position, index in enumerate(ordered.indices):
                uses.setdefault(index, []).append((len(views), position, side))
            views.append(ordered)
    # Not zeroed: every frame of every view is written below, damaged ones by their stand-ins.
    pixels = np.empty((len(views), 3, frames, *preprocessing.image_size), dtype=np.uint8)
    stand_ins_before = reader.stand_ins
    for index, frame in reader.decode(uses):
        # The colours of the frame as shown, (height, width) each, once for each short side in use.
        pictures = {side: reader.planes(frame, side) for side in {side for _, _, side in uses[index]}}
        for row, position, side in uses[index]:
            top, left, height, width = views[row].box
            for channel, plane in enumerate(pictures[side]):
                pixels[row, channel, position] = plane[top : top + height, left : left + width]
    # For an image model, which takes single frames, T is 1 and the axis is dropped: (V, 3, 1, H, W) -> (V, 3, H, W).
    clips = torch.from_numpy(pixels if preprocessing.frames is not None else pixels[:, :, 0])
    return clips, tuple(views), reader.stand_ins - stand_ins_before


def cut_image(picture: Tensor, protocol: Protocol, preprocessing: Preprocessing) -> tuple[Tensor, tuple[View, ...]]:
    """The views of a still image: uint8 (3, height, width) -> uint8 (V, 3, H, W). Every clip is the only frame.

    The image is resized bicubically with antialiasing, as in Microsoft's ImageNet evaluation (data/build.py of
    Swin-Transformer).
    """
    height, width = picture.shape[-2:]
    shown = size_for((height, width), resized_short_side(height, width, preprocessing.image_size, protocol.resize))
    resized = functional.interpolate(picture[None], size=shown, mode="bicubic", antialias=True)[0]
    views = plan_views(protocol, 1, *shown, 1, 1, preprocessing.image_size)
    crops = [
        resized[:, top : top + height, left : left + width] for top, left, height, width in (view.box for view in views)
    ]
    return torch.stack(crops), views


def read_video_or_image(
    path: Path, protocol: Protocol, preprocessing: Preprocessing, *, time_limit_seconds: float
) -> tuple[Tensor, tuple[View, ...]]:
    """`read_views` of a video or `cut_image` of an image file, whichever it is. Raises DecodeError."""
    if media_type_of(path) == IMAGE:
        return cut_image(read_image(path), protocol_for_images(protocol), preprocessing)
    return read_views(path, protocol, preprocessing, time_limit_seconds=time_limit_seconds)


def clip_frames_and_stride(preprocessing: Preprocessing) -> tuple[int, int]:
    """(frames, stride) of a clip; (1, 1) for an image model, which takes single frames."""
    return (1, 1) if preprocessing.frames is None else (preprocessing.frames, preprocessing.frame_stride)


def view_shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    """The shape of one view's pixels: (3, T, H, W), or (3, H, W) for image models."""
    time = () if preprocessing.frames is None else (preprocessing.frames,)
    return (3, *time, *preprocessing.image_size)


def _reorder(view: View, frame_order: str, seed: int, name: str, number: int) -> View:
    """View `number` of video `name` with its frames in the given order; depends on nothing but the arguments."""
    if frame_order == "in-order":
        return view
    if frame_order == "reversed":
        return View(view.start, view.indices[::-1], view.box)
    if frame_order != "shuffled":
        raise UsageError(f"data.frame_order: unknown order {frame_order!r}; use one of {', '.join(FRAME_ORDERS)}")
    # Seeded with a hash of the name, so that the order depends neither on the position of the video in the list nor on
    # the process that reads it. surrogateescape: file names need not be valid UTF-8. "<u4": eight little-endian words
    # on every machine.
    words = np.frombuffer(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), dtype="<u4")
    order = np.random.default_rng((seed, number, *words.tolist())).permutation(len(view.indices))
    return View(view.start, tuple(view.indices[i] for i in order), view.box)

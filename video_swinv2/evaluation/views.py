"""The pixels of a video's views, all cut from a single decode. V views, T frames, H W pixels of the crop.

Neighbouring views share most of their frames: in a 12-view test of 10-second videos, 4 clips x 3 crops show 384 frames,
of which at most 128 are different. So each video is opened once and decoded forwards once; each frame that any view shows is
resized once (per resize the protocols ask for), and copied into every (view, position in the clip) that shows it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.display import size_for
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.placement import resized_short_side
from video_swinv2.evaluation.protocols import Protocol, View, plan_views
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
    """The views of one video file: uint8 (V, 3, T, H, W), for image models (V, 3, H, W), and where each view lies.

    "shuffled" permutes the frames of a view as a function of (seed, name, view) only; `name` defaults to the path.
    Raises DecodeError for a video that cannot be read and UsageError for an unknown frame order.
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

    Only the crops are kept in memory, never whole frames. Also returns the number of damaged frames that were replaced
    by a neighbour. Raises as `read_views` does.
    """
    frames, stride = clip_frames_and_stride(preprocessing)
    views: list[View] = []
    # First invert the plan: for each frame of the video, the (view, position in the clip, short side in pixels) that
    # show it. A looped short video shows one frame at several positions of the same view.
    uses: dict[int, list[tuple[int, int, int]]] = {}
    for protocol in protocols:
        side = resized_short_side(*reader.size, preprocessing.image_size, protocol.resize)
        shown = size_for(reader.size, side)
        plan = plan_views(protocol, len(reader), *shown, frames, stride, preprocessing.image_size, reader.fps)
        for number, view in enumerate(plan):
            ordered = _reorder(view, frame_order, seed, name, number)
            for position, index in enumerate(ordered.indices):
                uses.setdefault(index, []).append((len(views), position, side))
            views.append(ordered)
    pixels = np.empty((len(views), 3, frames, *preprocessing.image_size), dtype=np.uint8)
    shower = Shower(reader)
    for index, frame in shower.frames(list(uses)):
        pictures = {side: reader.picture(frame, side) for side in {side for _, _, side in uses[index]}}
        for row, position, side in uses[index]:
            top, left, height, width = views[row].box
            crop = pictures[side][top : top + height, left : left + width]  # (H, W, 3)
            pixels[row, :, position] = crop.transpose(2, 0, 1)  # into (V, 3, T, H, W) at [row, :, position]
    # An image model takes single frames: T is 1, and the axis is dropped.
    clips = torch.from_numpy(pixels if preprocessing.frames is not None else pixels[:, :, 0])
    return clips, tuple(views), shower.stand_ins


class Shower:
    """The frames of an open video that are asked for, as decoded, in one forward pass.

    `stand_ins` counts the frames so far that could not be decoded and were stood in for by their neighbours.
    """

    def __init__(self, reader: VideoReader) -> None:
        self.stand_ins = 0
        self._reader = reader
        self._longest = 0  # way from one key frame to the next, of those that were passed

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame as decoded) of `wanted`, mostly ascending. Raises DecodeError where nothing can be decoded."""
        left = dict.fromkeys(sorted(wanted))
        lost: list[int] = []
        while left:
            reached = yield from self._run(left)
            passed = [index for index in left if index <= reached]
            lost += passed
            for index in passed:
                del left[index]
        # What is lost when decoding starts at a key frame may be there when it starts at the first.
        if lost:
            yield from self._from_the_start(lost)

    def _run(self, left: dict[int, None]) -> Generator[tuple[int, av.VideoFrame], None, float]:
        """Decode on from the key frame before the first of `left` to a gap that is worth a leap; the index reached.

        Takes what it yields out of `left`.
        """
        key: int | None = None
        for index, frame in self._reader.sequence(next(iter(left))):
            if frame.key_frame:
                self._longest = max(self._longest, index - (index if key is None else key))
                key = index
            if index not in left:
                continue
            del left[index]
            yield index, frame
            ahead = next((other for other in left if other > index), None)
            # Where key frames go on as regularly, the one before the next frame wanted is still to come.
            if ahead is None or 0 < self._longest < ahead - index:
                return index
        return math.inf

    def _from_the_start(self, lost: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """The lost frames: decoded after all, or the nearest earlier one that decodes, or else the next."""
        waiting = list(lost)
        before: av.VideoFrame | None = None
        for index, frame in self._reader.sequence():
            while waiting and waiting[0] < index:
                self.stand_ins += 1
                yield waiting.pop(0), before or frame
            if waiting and waiting[0] == index:
                yield waiting.pop(0), frame
            if not waiting:
                return
            before = frame
        if before is None:
            raise DecodeError(f"{self._reader.path}: no frame can be decoded", "no_frames")
        for index in waiting:
            self.stand_ins += 1
            yield index, before


def cut_image(picture: Tensor, protocol: Protocol, preprocessing: Preprocessing) -> tuple[Tensor, tuple[View, ...]]:
    """The views of a still image: uint8 (3, height, width) -> uint8 (V, 3, H, W); the only frame serves every clip.

    Resized bicubically with antialiasing, as in Microsoft's ImageNet evaluation (data/build.py of Swin-Transformer).
    """
    height, width = picture.shape[-2:]
    shown = size_for((height, width), resized_short_side(height, width, preprocessing.image_size, protocol.resize))
    resized = functional.interpolate(picture[None], size=shown, mode="bicubic", antialias=True)[0]
    views = plan_views(protocol, 1, *shown, 1, 1, preprocessing.image_size)
    crops = [
        resized[:, top : top + height, left : left + width] for top, left, height, width in (view.box for view in views)
    ]
    return torch.stack(crops), views


def clip_frames_and_stride(preprocessing: Preprocessing) -> tuple[int, int]:
    """(frames, stride) of a clip; (1, 1) for an image model, which takes single frames."""
    return (1, 1) if preprocessing.frames is None else (preprocessing.frames, preprocessing.frame_stride)


def view_shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    """The shape of one view's pixels: (3, T, H, W), for image models (3, H, W)."""
    time = () if preprocessing.frames is None else (preprocessing.frames,)
    return (3, *time, *preprocessing.image_size)


def _reorder(view: View, frame_order: str, seed: int, name: str, number: int) -> View:
    """View `number` of video `name` with its frames in the given order, a function of the arguments only."""
    if frame_order == "in-order":
        return view
    if frame_order == "reversed":
        return View(view.start, view.indices[::-1], view.box)
    if frame_order != "shuffled":
        raise UsageError(f"data.frame_order: unknown order {frame_order!r}; use one of {', '.join(FRAME_ORDERS)}")
    # The name is hashed, so that the order depends neither on the position of the video in the list nor on the process
    # that reads it. surrogateescape: file names need not be valid UTF-8.
    words = np.frombuffer(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), dtype="<u4")
    order = np.random.default_rng((seed, number, *words.tolist())).permutation(len(view.indices))
    return View(view.start, tuple(view.indices[i] for i in order), view.box)

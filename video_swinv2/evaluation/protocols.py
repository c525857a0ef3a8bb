"""Multi-view test protocols as data, and the arithmetic that turns one of them into frame indices and crop boxes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from video_swinv2.data.sampling import frame_indices
from video_swinv2.errors import UsageError

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the resized frame."""


@dataclass(frozen=True)
class Protocol:
    """How a video is looked at in a test: `clips` moments x `crops` places, each a view, whose results are averaged.

    Frames, stride and crop size are the model's own and no part of a protocol. `resize` is the length given to the side
    that limits the crop, as a multiple of the crop: 1 makes the frame just cover it.
    """

    name: str
    clips: int
    crops: int
    resize: Fraction
    starts: str
    boxes: str
    average: str
    source: str

    @property
    def views(self) -> int:
        """Number of views of one video."""
        return self.clips * self.crops


@dataclass(frozen=True)
class View:
    """One clip and crop: the frame it starts at, the frames it shows in the order shown, and its box."""

    start: int
    indices: tuple[int, ...]
    box: Box


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="center-1x1",
            clips=1,
            crops=1,
            resize=Fraction(256, 224),
            starts="segment-middle",
            boxes="centre",
            average="prob",
            source="Video Swin's validation: SampleFrames(num_clips=1, test_mode), Resize 256, CenterCrop 224",
        ),
        Protocol(
            name="center-full-1x1",
            clips=1,
            crops=1,
            resize=Fraction(1),
            starts="segment-middle",
            boxes="centre",
            average="prob",
            source="timm's crop_pct 1.0, which it tests the released image models of 384 pixels with",
        ),
        Protocol(
            name="videoswin-4x3",
            clips=4,
            crops=3,
            resize=Fraction(1),
            starts="segment-middle",
            boxes="three-along-the-long-side",
            average="prob",
            source="Video Swin's test: SampleFrames(num_clips=4, test_mode), Resize 224, ThreeCrop 224, softmax, mean",
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; raises UsageError naming the nearest one."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    nearest = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)[0]
    raise UsageError(f"protocol {name!r} is not known: did you mean {nearest}? (there are {', '.join(PROTOCOLS)})")


def of_stills(protocol: Protocol) -> Protocol:
    """The protocol for still images: its crops, of the one moment there is."""
    return replace(protocol, clips=1)


def clip_starts(rule: str, n: int, clips: int, frames: int, stride: int) -> tuple[int, ...]:
    """First frame of each of `clips` clips in a video of `n` frames; `frames` x `stride` is the span of a clip.

    Raises ValueError for a video without frames and for a rule that does not exist.
    """
    if n < 1:
        raise ValueError(f"a video of {n} frames has no clip")
    if rule not in _START_RULES:
        raise ValueError(f"no clip start rule {rule!r}; there are {', '.join(_START_RULES)}")
    return _START_RULES[rule](n, clips, frames * stride)


def crop_boxes(rule: str, height: int, width: int, size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes of `size` (H, W) in a frame of `height` x `width` pixels.

    Raises ValueError where the frame is smaller than the box and for a rule that does not exist.
    """
    if height < size[0] or width < size[1]:
        raise ValueError(f"a crop of {size[0]} x {size[1]} does not fit in a frame of {height} x {width}")
    if rule not in _BOX_RULES:
        raise ValueError(f"no crop rule {rule!r}; there are {', '.join(_BOX_RULES)}")
    return tuple((top, left, *size) for top, left in _BOX_RULES[rule](height - size[0], width - size[1]))


def short_side(height: int, width: int, size: tuple[int, int], resize: Fraction) -> int:
    """Pixels the short side of a `height` x `width` frame gets, so that crops of `size` (H, W) can be cut from it.

    For a square crop of S pixels this is round(resize * S), the published rule. A crop that is not square asks for the
    smallest frame that covers it in both directions, times `resize`: it is filled with picture, never with borders, and
    never squeezed.
    """
    short, long = min(height, width), max(height, width)
    crop_short, crop_long = size if height <= width else (size[1], size[0])
    side = max(round(resize * crop_short), round(resize * crop_long * Fraction(short, long)))
    # Readers round the long side to an even number, which may take a pixel from a crop that needs it.
    while side * long // short // 2 * 2 < crop_long:
        side += 1
    return side


def plan_views(
    protocol: Protocol, n_frames: int, height: int, width: int, frames: int, stride: int, size: tuple[int, int]
) -> tuple[View, ...]:
    """All views of `n_frames` frames that are `height` x `width` after the resize: clips outside, crops inside."""
    starts = clip_starts(protocol.starts, n_frames, protocol.clips, frames, stride)
    boxes = crop_boxes(protocol.boxes, height, width, size)
    return tuple(View(start, frame_indices(start, frames, stride, n_frames), box) for start in starts for box in boxes)


def _segment_middles(n: int, clips: int, span: int) -> tuple[int, ...]:
    """The middle of each of `clips` equal parts of the possible starts; all 0 where the video is shorter than a clip.

    In integers, this is the floor the source takes of k * avg + avg / 2 with avg = (n - span + 1) / clips.
    """
    possible = n - span + 1
    return tuple((2 * k + 1) * possible // (2 * clips) if possible > 0 else 0 for k in range(clips))


def _centre(spare_height: int, spare_width: int) -> tuple[tuple[int, int], ...]:
    return ((spare_height // 2, spare_width // 2),)


def _three_along_the_long_side(spare_height: int, spare_width: int) -> tuple[tuple[int, int], ...]:
    """First end, other end, middle, as the source orders them; steps are whole, an odd pixel stays at the far end."""
    steps = (0, 2, 1)
    if spare_width >= spare_height:
        return tuple((spare_height // 2, step * (spare_width // 2)) for step in steps)
    return tuple((step * (spare_height // 2), spare_width // 2) for step in steps)


_START_RULES: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {"segment-middle": _segment_middles}
_BOX_RULES: dict[str, Callable[[int, int], tuple[tuple[int, int], ...]]] = {
    "centre": _centre,
    "three-along-the-long-side": _three_along_the_long_side,
}

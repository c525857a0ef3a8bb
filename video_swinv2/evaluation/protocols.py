"""Multi-view test protocols as data, and the arithmetic that turns one of them into frame indices and crop boxes.

n frames of a video, K clips, S crops. Frames and size of a clip are the model's own; everything else is a protocol's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from video_swinv2.data.sampling import frame_indices
from video_swinv2.errors import UsageError

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the resized frame."""

SLOWFAST_FPS = 30
GRAMMAR = (
    "KxS:starts=videoswin|slowfast|videomae:crops=centre|videoswin|slowfast|even:resize=256/224:average=prob|logit"
    "[:stride=N], such as 5x3:starts=videomae:crops=even:resize=1:average=prob"
)


@dataclass(frozen=True)
class Protocol:
    """How a video is looked at in a test: `clips` moments x `crops` places, each a view, whose results are averaged.

    `starts` and `boxes` name the rules in `_CLIP_RULES` and `_BOX_RULES`. `resize` is the length given to the side that
    limits the crop, as a multiple of the crop: 1 makes the frame just cover it. `stride` is the distance of the frames
    of a clip; None takes the model's.
    """

    name: str
    clips: int
    crops: int
    resize: Fraction
    starts: str
    boxes: str
    average: str
    source: str
    stride: int | None = None

    @property
    def views(self) -> int:
        """Number of views of one video."""
        return self.clips * self.crops

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[:/]", "_", self.name)

    def numbers(self, frames: int, stride: int, size: tuple[int, int]) -> dict[str, Any]:
        """All that decides which pixels are seen, plain JSON, for clips of `frames` x `stride` and crops of `size`."""
        return {
            "clips": self.clips,
            "crops": self.crops,
            "frames": frames,
            "frame_stride": stride,
            "starts": self.starts,
            "boxes": self.boxes,
            "resize": str(self.resize),
            "crop_size": list(size),
            "average": self.average,
        }


@dataclass(frozen=True)
class View:
    """One clip and crop: the frame it starts at, the frames it shows in the order shown, and its box."""

    start: int
    indices: tuple[int, ...]
    box: Box


def _named(
    name: str, starts: str, boxes: str, source: str, resize: Fraction = Fraction(1), average: str = "prob"
) -> Protocol:
    clips, crops = (int(number) for number in name.rsplit("-", 1)[1].split("x"))
    return Protocol(name, clips, crops, resize, starts, boxes, average, source)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _named(
            "center-1x1",
            "videoswin",
            "centre",
            "Video Swin's validation: SampleFrames(num_clips=1, test_mode), Resize 256, CenterCrop 224",
            resize=Fraction(256, 224),
        ),
        _named(
            "center-full-1x1",
            "videoswin",
            "centre",
            "timm's crop_pct 1.0, which it tests the released image models of 384 pixels with",
        ),
        _named(
            "videoswin-4x3",
            "videoswin",
            "videoswin",
            "Video Swin's test: SampleFrames(num_clips=4, test_mode), Resize 224, ThreeCrop 224, softmax, mean",
        ),
        _named(
            "slowfast-10x3",
            "slowfast",
            "slowfast",
            "PySlowFast's test of whole decoded videos: clip k at k/10 of the slack at 30 frames a second, frames from "
            "linspace, three crops at the crop's own scale (TEST_CROP_SIZE, 256 there), softmax, mean",
        ),
        _named(
            "videomae-5x3",
            "videomae",
            "even",
            "VideoMAE's test: every stride-th frame from the first, 5 clips from end to end, 3 crops from end to end, "
            "softmax, mean",
        ),
        _named(
            "swinv2g-4x5",
            "videoswin",
            "even",
            "SwinV2 paper, table 5: 4 x 5 views of 8 frames. It does not say where they lie: here clips as in Video "
            "Swin's test, and five crops from end to end of the long side",
        ),
    )
}


def find_protocols(text: str) -> tuple[Protocol, ...]:
    """The protocols of names joined by commas. Raises UsageError for an unknown or repeated one."""
    found = tuple(find_protocol(name) for name in text.split(","))
    for place, protocol in enumerate(found):
        if protocol.folder in (other.folder for other in found[:place]):
            raise UsageError(f"protocol {protocol.name} is asked for twice; name it once")
    return found


def find_protocol(name: str) -> Protocol:
    """The protocol of that name, or the one that `name` states as GRAMMAR says; UsageError naming what is wrong."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if re.match(r"\d+x\d+(:|$)", name):
        return _stated(name)
    nearest = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)[0]
    raise UsageError(
        f"protocol {name!r} is not known: did you mean {nearest}? (there are {', '.join(PROTOCOLS)}, or {GRAMMAR})"
    )


def _stated(name: str) -> Protocol:
    """A protocol whose name says everything; numbers of views alone mean other frames in every toolkit."""
    shape, *parts = name.split(":")
    clips, crops = (int(number) for number in shape.split("x"))
    said = dict(part.partition("=")[::2] for part in parts)
    known = {
        "starts": "|".join(_CLIP_RULES),
        "crops": "|".join(_BOX_RULES),
        "resize": r"[1-9]\d*(/[1-9]\d*|\.\d+)?",
        "average": "prob|logit",
        "stride": r"[1-9]\d*",
    }
    unknown = [key for key in said if key not in known]
    lacking = [key for key in known if key not in said and key != "stride"]
    if unknown or lacking or len(said) < len(parts):
        wrong = (
            f"{unknown[0]!r} is not a key" if unknown else f"has no {', '.join(lacking) or 'one value for each key'}"
        )
        raise UsageError(f"protocol {name!r}: {wrong}; state all of {GRAMMAR}")
    for key, value in said.items():
        if not re.fullmatch(known[key], value):
            raise UsageError(f"protocol {name!r}: {key}={value} does not do; state it as {GRAMMAR}")
    fits = _CROPS_OF.get(said["crops"])
    if clips < 1 or crops < 1 or crops != (fits or crops) or Fraction(said["resize"]) < 1:
        raise UsageError(
            f"protocol {name!r}: clips and crops are 1 or more, resize is 1 or more, and crops=centre is 1 crop, "
            "crops=videoswin and crops=slowfast are 3"
        )
    stride = int(said["stride"]) if "stride" in said else None
    resize, source = Fraction(said["resize"]), "as stated by its name"
    return Protocol(name, clips, crops, resize, said["starts"], said["crops"], said["average"], source, stride)


def protocol_for_images(protocol: Protocol) -> Protocol:
    """The protocol for still images: its crops, of the one moment there is."""
    return replace(protocol, clips=1)


def clip_indices(
    rule: str, n: int, clips: int, frames: int, stride: int, fps: float = SLOWFAST_FPS
) -> tuple[tuple[int, ...], ...]:
    """The frames of each of `clips` clips in a video of `n` frames at `fps`; a clip is `frames`, `stride` apart.

    Raises ValueError for a video without frames and for a rule that does not exist.
    """
    if n < 1:
        raise ValueError(f"a video of {n} frames has no clip")
    if rule not in _CLIP_RULES:
        raise ValueError(f"no clip start rule {rule!r}; there are {', '.join(_CLIP_RULES)}")
    return _CLIP_RULES[rule](n, clips, frames, stride, fps)


def crop_boxes(rule: str, height: int, width: int, size: tuple[int, int], crops: int) -> tuple[Box, ...]:
    """`crops` boxes of `size` (H, W) in a frame of `height` x `width` pixels.

    Raises ValueError where the frame is smaller than the box and for a rule that does not exist.
    """
    if height < size[0] or width < size[1]:
        raise ValueError(f"a crop of {size[0]} x {size[1]} does not fit in a frame of {height} x {width}")
    if rule not in _BOX_RULES:
        raise ValueError(f"no crop rule {rule!r}; there are {', '.join(_BOX_RULES)}")
    spare_height, spare_width = height - size[0], width - size[1]
    along_width = spare_width >= spare_height
    places, middle = _BOX_RULES[rule](max(spare_height, spare_width), crops), min(spare_height, spare_width) // 2
    return tuple((middle, place, *size) if along_width else (place, middle, *size) for place in places)


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
    protocol: Protocol,
    n_frames: int,
    height: int,
    width: int,
    frames: int,
    stride: int,
    size: tuple[int, int],
    fps: float = SLOWFAST_FPS,
) -> tuple[View, ...]:
    """All views of `n_frames` frames that are `height` x `width` after the resize: clips outside, crops inside."""
    clips = clip_indices(protocol.starts, n_frames, protocol.clips, frames, protocol.stride or stride, fps)
    boxes = crop_boxes(protocol.boxes, height, width, size, protocol.crops)
    return tuple(View(indices[0], indices, box) for indices in clips for box in boxes)


def _videoswin_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> tuple[tuple[int, ...], ...]:
    """The middle of each of `clips` equal parts of the possible starts; 0 and wrapping where the video is too short.

    In integers, this is the floor the source takes of k * avg + avg / 2 with avg = (n - span + 1) / clips.
    """
    possible = max(n - frames * stride + 1, 0)
    starts = ((2 * k + 1) * possible // (2 * clips) for k in range(clips))
    return tuple(frame_indices(start, frames, stride, n) for start in starts)


def _slowfast_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> tuple[tuple[int, ...], ...]:
    """Clip k starts at k / clips of the slack, so that the last never reaches the end; the last frame is repeated.

    The stride counts frames at 30 a second. The frames of a clip are spread from its first to its last position, a
    little more than a stride apart (8 x 8 frames are 9 apart), and each is the frame before its place.
    """
    # To the hundredth, since times in files are rounded; exact from there on.
    span = frames * stride * Fraction(round(100 * fps), 100 * SLOWFAST_FPS)
    step = (span - 1) / (frames - 1) if frames > 1 else Fraction(0)
    starts = (max(n - span, Fraction(0)) * k / clips for k in range(clips))
    return tuple(
        tuple(int(min(max(start + step * j, Fraction(0)), Fraction(n - 1))) for j in range(frames)) for start in starts
    )


def _videomae_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> tuple[tuple[int, ...], ...]:
    """Of every stride-th frame from the first, clips spread from end to end; the last such frame is repeated.

    One clip, which the source cannot do (it divides by clips - 1), is the middle one.
    """
    kept = -(-n // stride)
    starts = _end_to_end(max(kept - frames, 0), clips)
    return tuple(tuple(stride * min(start + j, kept - 1) for j in range(frames)) for start in starts)


def _end_to_end(spare: int, places: int) -> tuple[int, ...]:
    """`places` whole numbers spread over 0..spare, both ends included; a single one is the middle."""
    return (spare // 2,) if places == 1 else tuple(k * spare // (places - 1) for k in range(places))


def _videoswin_boxes(spare: int, crops: int) -> tuple[int, ...]:
    """First end, other end, middle, as the source orders them; steps are whole, an odd pixel stays at the far end."""
    return (0, spare // 2 * 2, spare // 2)


def _slowfast_boxes(spare: int, crops: int) -> tuple[int, ...]:
    """First end, middle (rounded up, as the source does), other end."""
    return (0, -(-spare // 2), spare)


_CLIP_RULES: dict[str, Callable[[int, int, int, int, float], tuple[tuple[int, ...], ...]]] = {
    "videoswin": _videoswin_clips,
    "slowfast": _slowfast_clips,
    "videomae": _videomae_clips,
}
_BOX_RULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "centre": lambda spare, crops: (spare // 2,),
    "videoswin": _videoswin_boxes,
    "slowfast": _slowfast_boxes,
    "even": _end_to_end,
}
_CROPS_OF = {"centre": 1, "videoswin": 3, "slowfast": 3}
"""How many crops a rule makes; the others make as many as asked for."""

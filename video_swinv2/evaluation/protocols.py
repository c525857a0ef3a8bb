"""Multi-view test protocols as data: which clips and crops of a video a test looks at, and how it averages them.

A *view* is one clip and one crop of it. The model determines the number of frames in a clip and the size of a crop, and
the protocol everything else. The arithmetic of clips and crops is in `placement.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from video_swinv2.errors import UsageError, nearest_name
from video_swinv2.evaluation.placement import (
    CLIP_RULES,
    CROP_RULES,
    FIXED_CROPS,
    SLOWFAST_FPS,
    Box,
    clip_indices,
    crop_boxes,
)

GRAMMAR = (
    "KxS:starts=videoswin|slowfast|videomae:crops=centre|videoswin|slowfast|even:resize=256/224:average=prob|logit"
    "[:stride=N], such as 5x3:starts=videomae:crops=even:resize=1:average=prob"
)


@dataclass(frozen=True)
class Protocol:
    """How a test looks at a video: `clips` x `crops` views, whose scores are averaged.

    `starts` names a rule in `CLIP_RULES`, `boxes` one in `CROP_RULES`. Frames are resized to `resize` times the size at
    which they just cover the crop. `average` is "prob" (the mean of the views' softmax) or "logit" (the softmax of the
    mean of their logits). `source` says where the protocol comes from. `stride` is the distance between the frames of a
    clip; None takes the model's.
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
        """The number of views per video."""
        return self.clips * self.crops

    @property
    def folder(self) -> str:
        """The name of the folder for this protocol's results: its own name with : and / replaced."""
        return re.sub(r"[:/]", "_", self.name)

    def numbers(self, frames: int, stride: int, size: tuple[int, int]) -> dict[str, Any]:
        """All numbers that determine the views, for clips of `frames` x `stride` and crops of `size`, as plain JSON.

        Part of every results.json. Two tests of the same videos with equal numbers looked at the same pixels and
        averaged alike.
        """
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
    """One clip and crop: the index of the first frame, the frames in the order the model sees them, the crop's box."""

    start: int
    indices: tuple[int, ...]
    box: Box


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
    """All views of a video with `n_frames` frames of `height` x `width` pixels, as they are after resizing.

    View k * S + s is crop s (of S) of clip k: clips outside, crops inside. Scores are stored in this order, and the
    views curve of a report relies on it.
    """
    clips = clip_indices(protocol.starts, n_frames, protocol.clips, frames, protocol.stride or stride, fps)
    boxes = crop_boxes(protocol.boxes, height, width, size, protocol.crops)
    return tuple(View(indices[0], indices, box) for indices in clips for box in boxes)


def _published(
    name: str, starts: str, boxes: str, source: str, resize: Fraction = Fraction(1), average: str = "prob"
) -> Protocol:
    """A published protocol, whose name ends in the number of clips x crops: "videoswin-4x3" is 4 clips of 3 crops."""
    clips, crops = (int(number) for number in name.rsplit("-", 1)[1].split("x"))
    return Protocol(name, clips, crops, resize, starts, boxes, average, source)


# Letters: n frames in the video; a clip of T frames, `stride` apart, spans T * stride frames; the crop is S x S pixels.
# A protocol is part of what published numbers mean, so the numbers here never change: a different one is a new entry.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # One clip with start = floor((n - span + 1) / 2). Short side 256 for S = 224; the crop from the centre.
        _published(
            "center-1x1",
            "videoswin",
            "centre",
            "Video Swin's validation: SampleFrames(num_clips=1, test_mode), Resize 256, CenterCrop 224",
            resize=Fraction(256, 224),
        ),
        # The same clip. Short side S, so that the crop takes all of it.
        _published(
            "center-full-1x1",
            "videoswin",
            "centre",
            "timm's crop_pct 1.0, which it tests the released image models of 384 pixels with",
        ),
        # Start of clip k = floor((k + 1/2) * (n - span + 1) / 4), the middle of each quarter of the possible starts.
        # Short side S; crops at both ends and in the middle of the long side.
        _published(
            "videoswin-4x3",
            "videoswin",
            "videoswin",
            "Video Swin's test: SampleFrames(num_clips=4, test_mode), Resize 224, ThreeCrop 224, softmax, mean",
        ),
        # Start of clip k = k / 10 * (n - span), where span counts frames at 30 per second. The frames are those of
        # linspace(start, start + span - 1, T), rounded down. Short side S; crops left, middle, right.
        _published(
            "slowfast-10x3",
            "slowfast",
            "slowfast",
            "PySlowFast's test of whole decoded videos: clip k at k/10 of the slack at 30 frames a second, frames from "
            "linspace, three crops at the crop's own scale (TEST_CROP_SIZE, 256 there), softmax, mean",
        ),
        # Of the m = ceil(n / stride) frames 0, stride, 2 * stride, ... clip k takes T, beginning with number
        # floor(k * (m - T) / 4): the first clip starts at the beginning of the video, and the last ends at its end.
        # Short side S; crops from end to end.
        _published(
            "videomae-5x3",
            "videomae",
            "even",
            "VideoMAE's test: every stride-th frame from the first, 5 clips from end to end, 3 crops from end to end, "
            "softmax, mean",
        ),
        # The clips of videoswin-4x3. Short side S; crop s at floor(s * (long side - S) / 4) along the long side.
        _published(
            "swinv2g-4x5",
            "videoswin",
            "even",
            "SwinV2 paper, table 5: 4 x 5 views of 8 frames. It does not say where they lie: here clips as in Video "
            "Swin's test, and five crops from end to end of the long side",
        ),
    )
}


def find_protocols(text: str) -> tuple[Protocol, ...]:
    """The protocols named in `text`, joined by commas. Raises UsageError for an unknown or repeated name."""
    found = tuple(find_protocol(name) for name in text.split(","))
    # Compared by folder: results of two protocols with the same folder would overwrite each other.
    for number, protocol in enumerate(found):
        if protocol.folder in (other.folder for other in found[:number]):
            raise UsageError(f"protocol {protocol.name} is given twice; name it once")
    return found


def find_protocol(name: str) -> Protocol:
    """The published protocol called `name`, or the protocol that `name` spells out as in `GRAMMAR`.

    Raises UsageError that says what is wrong with the name, for an unknown one with a name that is near or all of them.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    # "5x3" alone counts as spelled out too: the message about its missing keys helps more than a suggestion.
    if re.match(r"\d+x\d+(:|$)", name):
        return _parse_protocol(name)
    near = nearest_name(name, PROTOCOLS)
    fix = f"did you mean {near}?" if near else f"known are {', '.join(PROTOCOLS)}; or spell it out as {GRAMMAR}"
    raise UsageError(f"unknown protocol {name!r}; {fix}")


def protocol_for_images(protocol: Protocol) -> Protocol:
    """The protocol as applied to still images: all of its crops, of a single clip that is the image."""
    return replace(protocol, clips=1)


def _parse_protocol(name: str) -> Protocol:
    """A protocol spelled out in its name, such as "5x3:starts=videomae:crops=even:resize=1:average=prob".

    Every key but stride is required, because "5x3" alone means different frames and crops in every toolkit.
    """
    shape, *parts = name.split(":")
    clips, crops = (int(number) for number in shape.split("x"))
    values = _parse_keys(name, parts)
    # Rules that define their own number of crops allow no other.
    fixed = FIXED_CROPS.get(values["crops"])
    resize = Fraction(values["resize"])
    if clips < 1 or crops < 1 or crops != (fixed or crops) or resize < 1:
        raise UsageError(
            f"protocol {name!r}: clips and crops must be 1 or more, resize must be 1 or more, crops=centre is 1 crop, "
            "crops=videoswin and crops=slowfast are 3"
        )
    stride = int(values["stride"]) if "stride" in values else None
    source = "as spelled out in its name"
    return Protocol(name, clips, crops, resize, values["starts"], values["crops"], values["average"], source, stride)


def _parse_keys(name: str, parts: list[str]) -> dict[str, str]:
    """The key=value parts of a spelled-out protocol as a dict.

    Raises UsageError for keys that are unknown, missing or given twice, and for invalid values.
    """
    patterns = {
        "starts": "|".join(CLIP_RULES),
        "crops": "|".join(CROP_RULES),
        "resize": r"[1-9]\d*(/[1-9]\d*|\.\d+)?",
        "average": "prob|logit",
        "stride": r"[1-9]\d*",
    }
    # partition returns (key, "=", value), of which [::2] keeps key and value. A repeated key overwrites the earlier one
    # and leaves the dict shorter than `parts`.
    values = dict(part.partition("=")[::2] for part in parts)
    unknown = [key for key in values if key not in patterns]
    missing = [key for key in patterns if key not in values and key != "stride"]
    if unknown:
        raise UsageError(f"protocol {name!r}: unknown key {unknown[0]!r}; spell it out as {GRAMMAR}")
    if missing:
        raise UsageError(f"protocol {name!r}: {', '.join(missing)} missing; spell it out as {GRAMMAR}")
    if len(values) < len(parts):
        raise UsageError(f"protocol {name!r}: a key is given twice; spell it out as {GRAMMAR}")
    for key, value in values.items():
        if not re.fullmatch(patterns[key], value):
            raise UsageError(f"protocol {name!r}: invalid {key}={value}; spell it out as {GRAMMAR}")
    return values

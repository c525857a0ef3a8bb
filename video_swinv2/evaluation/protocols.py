"""Multi-view test protocols as data: which clips and crops of a video a test looks at, and how it averages them.

A *view* is one clip and one crop of it. The number of frames of a clip and the size of a crop belong to the model;
everything else belongs to the protocol. The arithmetic of clips and crops is in `placement.py`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from video_swinv2.errors import UsageError
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

    `starts` names a rule in `CLIP_RULES`, `boxes` one in `CROP_RULES`. The frame is resized until its limiting side is
    `resize` times as long as the crop's; with 1 it just covers the crop. `average` is "prob" (softmax, then mean) or
    "logit". `stride` is the distance between the frames of a clip; None takes the model's.
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
        """The number of views of one video."""
        return self.clips * self.crops

    @property
    def folder(self) -> str:
        """The name of this protocol's results folder: its own name without characters that paths do not allow."""
        return re.sub(r"[:/]", "_", self.name)

    def numbers(self, frames: int, stride: int, size: tuple[int, int]) -> dict[str, Any]:
        """All that determines which pixels are seen, for clips of `frames` x `stride` and crops of `size`; plain JSON.

        Part of every results.json: two tests with equal numbers looked at the same pixels.
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
    """One clip and crop: the frame the clip starts at, the frames in the order shown, and the crop's box."""

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
    """All views of a video of `n_frames` frames that are `height` x `width` pixels after the resize.

    View k * S + s is crop s of clip k: clips outside, crops inside.
    """
    clips = clip_indices(protocol.starts, n_frames, protocol.clips, frames, protocol.stride or stride, fps)
    boxes = crop_boxes(protocol.boxes, height, width, size, protocol.crops)
    return tuple(View(indices[0], indices, box) for indices in clips for box in boxes)


def _published(
    name: str, starts: str, boxes: str, source: str, resize: Fraction = Fraction(1), average: str = "prob"
) -> Protocol:
    """A protocol of a paper; its name ends in the number of clips x crops."""
    clips, crops = (int(number) for number in name.rsplit("-", 1)[1].split("x"))
    return Protocol(name, clips, crops, resize, starts, boxes, average, source)


# n frames in the video; a clip of T frames, `stride` apart, spans T * stride frames; the crop is S x S pixels.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # start = floor((n - span + 1) / 2); short side 256 for S = 224, crop from the centre.
        _published(
            "center-1x1",
            "videoswin",
            "centre",
            "Video Swin's validation: SampleFrames(num_clips=1, test_mode), Resize 256, CenterCrop 224",
            resize=Fraction(256, 224),
        ),
        # The same clip; short side S, so that the crop takes the full short side.
        _published(
            "center-full-1x1",
            "videoswin",
            "centre",
            "timm's crop_pct 1.0, which it tests the released image models of 384 pixels with",
        ),
        # start of clip k = floor((k + 1/2) * (n - span + 1) / 4): the middle of each quarter of the possible starts.
        # Short side S; crops at both ends and in the middle of the long side.
        _published(
            "videoswin-4x3",
            "videoswin",
            "videoswin",
            "Video Swin's test: SampleFrames(num_clips=4, test_mode), Resize 224, ThreeCrop 224, softmax, mean",
        ),
        # start of clip k = k / 10 * (n - span), span in frames at 30 a second; frames from linspace(start, start + span
        # - 1, T), rounded down. Short side S; crops left, middle, right.
        _published(
            "slowfast-10x3",
            "slowfast",
            "slowfast",
            "PySlowFast's test of whole decoded videos: clip k at k/10 of the slack at 30 frames a second, frames from "
            "linspace, three crops at the crop's own scale (TEST_CROP_SIZE, 256 there), softmax, mean",
        ),
        # Of the m = ceil(n / stride) frames 0, stride, 2 * stride, ... clip k takes T from floor(k * (m - T) / 4): the
        # first clip starts at the beginning, the last ends at the end. Short side S; crops from end to end.
        _published(
            "videomae-5x3",
            "videomae",
            "even",
            "VideoMAE's test: every stride-th frame from the first, 5 clips from end to end, 3 crops from end to end, "
            "softmax, mean",
        ),
        # The clips of videoswin-4x3; crop s at floor(s * (long side - S) / 4).
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
    for number, protocol in enumerate(found):
        if protocol.folder in (other.folder for other in found[:number]):
            raise UsageError(f"protocol {protocol.name} is given twice; name it once")
    return found


def find_protocol(name: str) -> Protocol:
    """The published protocol called `name`, or the one that `name` spells out as in `GRAMMAR`.

    Raises UsageError that says what is wrong with the name, and suggests the nearest one.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if re.match(r"\d+x\d+(:|$)", name):
        return _parse_protocol(name)
    nearest = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)[0]
    raise UsageError(
        f"unknown protocol {name!r}: did you mean {nearest}? (known: {', '.join(PROTOCOLS)}; or spell it out as "
        f"{GRAMMAR})"
    )


def protocol_for_images(protocol: Protocol) -> Protocol:
    """The protocol applied to still images: all its crops of the only frame."""
    return replace(protocol, clips=1)


def _parse_protocol(name: str) -> Protocol:
    """A protocol spelled out in its name, such as "5x3:starts=videomae:crops=even:resize=1:average=prob".

    Every key is required: "5x3" alone means different frames and crops in every toolkit.
    """
    shape, *parts = name.split(":")
    clips, crops = (int(number) for number in shape.split("x"))
    values = _parse_keys(name, parts)
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
    """The key=value parts of a spelled-out protocol. Raises UsageError for unknown, missing and invalid ones."""
    patterns = {
        "starts": "|".join(CLIP_RULES),
        "crops": "|".join(CROP_RULES),
        "resize": r"[1-9]\d*(/[1-9]\d*|\.\d+)?",
        "average": "prob|logit",
        "stride": r"[1-9]\d*",
    }
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

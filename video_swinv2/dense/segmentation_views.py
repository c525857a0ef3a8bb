"""How a test looks at an image: as a whole or through a sliding window, at one scale or several, and mirrored.

Letters: H W pixels of the image, K classes, h w pixels of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from video_swinv2.dense.segmentation_transforms import scaled_size
from video_swinv2.dense.upernet import enlarged

Segment = Callable[[Tensor], Tensor]
"""A segmenter: normalised images (B, 3, H, W) -> logits (B, K, H, W)."""


@dataclass(frozen=True)
class SegmentationViews:
    """The views of an image, whose class probabilities are averaged. Raises ValueError for values that make none."""

    mode: Literal["whole", "slide"] = "whole"
    """`whole`: the image at once. `slide`: overlapping windows, whose logits are averaged."""
    crop: tuple[int, int] | None = None
    """(h, w) of the windows, as in training."""
    stride: tuple[int, int] | None = None
    """Distance between neighbouring windows in pixels; by default two thirds of the window."""
    short_side: int | None = None
    """Pixels to which the shorter side of the image is scaled, before `scales` apply; None keeps the image's size."""
    scales: tuple[float, ...] = (1.0,)
    """Factors by which the image is resized, one view each. Published multi-scale tests use 0.5, 0.75, ..., 1.75."""
    flip: bool = False
    """Whether every view is also seen mirrored."""
    windows_at_once: int = 4
    """Windows that go through the model together."""

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "slide"):
            raise ValueError(f"mode: {self.mode!r} is not one of whole, slide")
        if self.mode == "slide" and self.crop is None:
            raise ValueError("crop: a sliding window needs its size; give (h, w) in pixels")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales: invalid value {self.scales}; give positive factors")
        for key, sizes in (("crop", self.crop), ("stride", self.stride)):
            if sizes is not None and min(sizes) < 1:
                raise ValueError(f"{key}: invalid value {sizes}; give positive numbers of pixels")
        if self.crop and self.stride and any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            raise ValueError(f"stride: {self.stride} leaves gaps between windows of {self.crop}; use a smaller one")


def class_probabilities(segment: Segment, image: Tensor, views: SegmentationViews) -> Tensor:
    """The class probabilities of every pixel, float32 (K, H, W), the mean over all views.

    image: normalised, (3, H, W). Logits are enlarged to its size before the softmax, as in mmsegmentation.
    """
    size = (image.shape[-2], image.shape[-1])
    total, count = torch.zeros(()), 0
    for scale in views.scales:
        shown = TF.resize(image, list(scaled_size(size, views.short_side, scale)), antialias=True)
        for mirrored in (False, True) if views.flip else (False,):
            logits = _logits(segment, shown.flip(-1) if mirrored else shown, views)
            logits = logits.flip(-1) if mirrored else logits
            probabilities = enlarged(logits[None], size)[0].softmax(dim=0)
            total, count = total.to(probabilities) + probabilities, count + 1
    return total / count


def _logits(segment: Segment, image: Tensor, views: SegmentationViews) -> Tensor:
    """The logits of an image (3, H, W) at its own size, float32 (K, H, W)."""
    if views.mode == "whole" or views.crop is None:
        return segment(image[None])[0].float()
    places = list(windows(image.shape[-2:], views.crop, views.stride))
    total, seen = torch.zeros(()), torch.zeros(image.shape[-2:], device=image.device)
    for start in range(0, len(places), views.windows_at_once):
        some = places[start : start + views.windows_at_once]
        logits = segment(torch.stack([image[:, rows, columns] for rows, columns in some])).float()
        if not total.ndim:
            total = logits.new_zeros((logits.shape[1], *seen.shape))
        for (rows, columns), found in zip(some, logits, strict=True):
            total[:, rows, columns] += found
            seen[rows, columns] += 1
    return total / seen


def windows(
    size: torch.Size | tuple[int, int], crop: tuple[int, int], stride: tuple[int, int] | None = None
) -> Iterator[tuple[slice, slice]]:
    """The places of the sliding window, rows first. They cover the image, and none reaches beyond it.

    The last window of a row or column ends where the image ends, and so overlaps more. An image that is smaller than
    the window gives a window of its own size.
    """
    height, width = crop
    down, across = stride or tuple(max(round(side * 2 / 3), 1) for side in crop)
    for top in _starts(size[0], height, down):
        for left in _starts(size[1], width, across):
            yield slice(top, min(top + height, size[0])), slice(left, min(left + width, size[1]))


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where the windows along one axis begin."""
    last = max(side - crop, 0)
    return [*range(0, last, stride), last]


def predicted_classes(segment: Segment, image: Tensor, views: SegmentationViews) -> Tensor:
    """The most probable class of every pixel, uint8 (H, W)."""
    return class_probabilities(segment, image, views).argmax(dim=0).to(torch.uint8)

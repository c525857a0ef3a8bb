"""How frames become the input of a model: the sizes of a clip, and the mean and standard deviation of its channels."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How frames become the input of a model."""

    frames: int | None
    """Frames per clip; None for an image model."""
    frame_stride: int
    """Distance between the frames of a clip, in frames of the video."""
    image_size: tuple[int, int]
    """(H, W) in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    """Mean and standard deviation per channel, for pixels from 0 to 1."""

"""Augmentation of an image together with its mask of classes: scale, crop, flip, photometric distortion and padding.

Letters: H W pixels, K classes.

The steps, their order and their numbers are those of mmsegmentation's recipes, which Swin's published results use. But
images are resized with antialiasing, and saturation is changed by blending with grey instead of in HSV.

Everything random comes from a generator, so that the result is a function of what the generator was seeded with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from video_swinv2.data.transforms import GREY
from video_swinv2.dense.segmenters import IGNORE

CROPS = 10  # draws of a crop in which no class takes too much
BRIGHTNESS = 32.0  # of 255, the most that is added or subtracted
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 180  # of a turn


@dataclass(frozen=True)
class SegmentationAugment:
    """The training augmentation: every image becomes a crop of one size. Raises ValueError for numbers out of order."""

    size: tuple[int, int]
    """(H, W) of the crop."""
    short_side: int | None = None
    """Pixels to which the shorter side of the image is scaled before `scale` applies; None keeps the image's size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor by which the image is resized."""
    max_class_share: float = 0.75
    """A crop is drawn again, up to ten times, while a class has at least this share of its pixels."""
    flip: float = 0.5
    """The probability of a horizontal flip."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue are changed."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size: invalid value {self.size}; give (H, W) in pixels")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: invalid value {self.scale}; give two factors, the smaller first")
        if not 0 < self.max_class_share <= 1 or not 0 <= self.flip <= 1:
            raise ValueError("max_class_share, flip: give numbers between 0 and 1")

    def __call__(self, image: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """An image, uint8 (3, height, width), and its mask (height, width) -> (3, H, W) and (H, W), same dtypes.

        Without a generator, torch's global one is drawn from.
        """
        low, high = self.scale
        factor = low + (high - low) * _uniform(generator)
        image, mask = resize(image, mask, scaled_size(image.shape[-2:], self.short_side, factor))
        image, mask = self._crop(image, mask, generator)
        if _uniform(generator) < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        if self.photometric:
            image = distort(image, generator)
        return pad(image, mask, self.size)

    def _crop(self, image: Tensor, mask: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        height, width = self.size
        below, beside = (max(side - crop, 0) for side, crop in zip(mask.shape, self.size, strict=True))
        rows, columns = slice(None), slice(None)
        for _ in range(CROPS):
            top = int(torch.randint(below + 1, (), generator=generator))
            left = int(torch.randint(beside + 1, (), generator=generator))
            rows, columns = slice(top, top + height), slice(left, left + width)
            if largest_share(mask[rows, columns]) < self.max_class_share:
                break
        return image[:, rows, columns], mask[rows, columns]


def scaled_size(size: Sequence[int], short_side: int | None, factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image whose shorter side is scaled to `short_side`, if given, and then both by `factor`."""
    height, width = size
    scale = factor if short_side is None else factor * short_side / min(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resize(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both at another (height, width): the image antialiased, and of the mask the pixel whose centre is nearest."""
    if tuple(mask.shape) == size:
        return image, mask
    nearest = F.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return F.resize(image, list(size), antialias=True), nearest


def largest_share(mask: Tensor) -> float:
    """The share of the most frequent class among the pixels that belong to one; 1 if there are none."""
    counts = torch.bincount(mask[mask != IGNORE].flatten().long())
    return float(counts.max() / counts.sum()) if len(counts) and counts.sum() else 1.0


def distort(image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Photometric distortion of SSD (arXiv 1512.02325) on uint8 (3, H, W): each change with probability 0.5.

    Brightness is added. Contrast multiplies, before saturation and hue or after them.
    """
    if _uniform(generator) < 0.5:
        image = _bytes(image + BRIGHTNESS * (2 * _uniform(generator) - 1))
    contrast = _between(CONTRAST, generator) if _uniform(generator) < 0.5 else 1.0
    contrast_first = _uniform(generator) < 0.5
    if contrast_first:
        image = _bytes(image * contrast)
    if _uniform(generator) < 0.5:
        image = F.adjust_saturation(image, _between(SATURATION, generator))
    if _uniform(generator) < 0.5:
        image = F.adjust_hue(image, _between((-HUE, HUE), generator))
    return image if contrast_first else _bytes(image * contrast)


def pad(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both with padding at the bottom and right up to (H, W): ImageNet's mean colour, and IGNORE in the mask."""
    height, width = mask.shape
    if (height, width) == size:
        return image.contiguous(), mask.contiguous()
    padded = torch.tensor(GREY, dtype=image.dtype)[:, None, None].repeat(1, *size)
    padded[:, :height, :width] = image
    padded_mask = mask.new_full(size, IGNORE)
    padded_mask[:height, :width] = mask
    return padded, padded_mask


def _uniform(generator: torch.Generator | None) -> float:
    return float(torch.rand((), generator=generator))


def _between(bounds: tuple[float, float], generator: torch.Generator | None) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * _uniform(generator)


def _bytes(image: Tensor) -> Tensor:
    """Values as uint8, rounded down as mmsegmentation does, and clipped to 0..255."""
    return image if image.dtype == torch.uint8 else image.clamp(0, 255).to(torch.uint8)

"""Augmentation of an image together with its boxes and masks: multi-scale resizing, large-scale jitter and flips.

Letters: H W pixels, N objects.

A target holds `boxes` float32 (N, 4) as x1, y1, x2, y2 in pixels and `labels` int64 (N,), optionally `masks` uint8 (N,
H, W), `area` float32 (N,) and `iscrowd` int64 (N,), and `image_id`, a number. All of them stay consistent, and objects
that a crop removes are removed from each.

Everything random comes from a generator, so that the result is a function of what the generator was seeded with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from video_swinv2.data.datasets import Target

SMALLEST_SIDE = 1.0  # pixels; of what a crop leaves of a box, anything smaller is dropped
PADDING = 114  # grey value of what a crop has beyond the image; close to ImageNet's mean


@dataclass(frozen=True)
class DetectionAugment:
    """The training augmentation of Swin's detection code, or large-scale jitter, each followed by a random flip.

    Raises ValueError for numbers that are out of order.
    """

    short_sides: tuple[int, int] = (480, 800)
    """The shorter side of the image in pixels is drawn between these, both included (multi-scale training)."""
    max_side: int = 1333
    """Its longer side is at most this many pixels."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter instead (arXiv 2012.07177): the image is scaled to fit `jitter_size`, times a factor drawn
    between these, such as (0.1, 2.0), and then cropped or padded to it."""
    jitter_size: int = 1024
    """Side of the square that large-scale jitter crops or pads to, in pixels."""
    flip: float = 0.5
    """The probability of a horizontal flip."""

    def __post_init__(self) -> None:
        low, high = self.short_sides
        if not 0 < low <= high <= self.max_side:
            raise ValueError(f"short_sides: {list(self.short_sides)} with max_side {self.max_side}; order them by size")
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter: invalid value {list(self.jitter)}; give two factors, the smaller first")
        if self.jitter_size < 1:
            raise ValueError(f"jitter_size: invalid value {self.jitter_size}; give a positive number of pixels")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: invalid value {self.flip}; give a probability between 0 and 1")

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """An image, uint8 (3, H, W), and its target -> both augmented."""
        height, width = image.shape[-2:]
        if self.jitter is None:
            low, high = self.short_sides
            short_side = int(torch.randint(low, high + 1, (), generator=generator))
            image, target = resize(image, target, fitted_size((height, width), short_side, self.max_side))
        else:
            image, target = self._jittered(image, target, self.jitter, generator)
        # Drawn whatever the probability is, so that changing it does not change the sizes of later images.
        if float(torch.rand((), generator=generator)) < self.flip:
            image, target = flip(image, target)
        return image, dict(target)

    def _jittered(
        self, image: Tensor, target: Target, factors: tuple[float, float], generator: torch.Generator
    ) -> tuple[Tensor, Target]:
        side = self.jitter_size
        height, width = image.shape[-2:]
        factor = factors[0] + (factors[1] - factors[0]) * float(torch.rand((), generator=generator))
        scale = factor * side / max(height, width)
        image, target = resize(image, target, (max(round(height * scale), 1), max(round(width * scale), 1)))
        # What is larger than the square is cropped at a random place; what is smaller lies at its top left.
        tops, lefts = (max(n - side, 0) for n in image.shape[-2:])
        place = torch.rand(2, generator=generator).tolist()
        return crop(image, target, round(tops * place[0]), round(lefts * place[1]), (side, side))


def fitted_size(size: tuple[int, int], short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) of an image scaled to this shorter side, or less if its longer side would exceed `max_side`."""
    scale = min(short_side / min(size), max_side / max(size))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def resize(image: Tensor, target: Target, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The image (3, H, W) and its target at another (height, width): antialiased, and masks by the nearest pixel."""
    height, width = image.shape[-2:]
    vertical, horizontal = size[0] / height, size[1] / width
    changed = dict(target)
    if (height, width) != size:
        image = F.resize(image, list(size), antialias=True)
    if "boxes" in changed:
        changed["boxes"] = changed["boxes"] * changed["boxes"].new_tensor([horizontal, vertical] * 2)
    if "area" in changed:
        changed["area"] = changed["area"] * (vertical * horizontal)
    if "masks" in changed:
        changed["masks"] = _resized_masks(changed["masks"], size)
    return image, changed


def _resized_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) -> (N, *size). The pixel whose centre is nearest, as `resize` of images places pixels."""
    if tuple(masks.shape[1:]) == size:
        return masks
    if not len(masks):
        return masks.new_zeros((0, *size))
    return F.resize(masks, list(size), interpolation=InterpolationMode.NEAREST_EXACT)


def flip(image: Tensor, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
    """The image and its target mirrored left to right."""
    changed = dict(target)
    if "boxes" in changed:
        left, top, right, bottom = changed["boxes"].unbind(1)
        width = image.shape[-1]
        changed["boxes"] = torch.stack((width - right, top, width - left, bottom), dim=1)
    if "masks" in changed:
        changed["masks"] = changed["masks"].flip(-1)
    return image.flip(-1), changed


def crop(image: Tensor, target: Target, top: int, left: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the image and of its target from (top, left) on, of `size` (height, width).

    Beyond the image it is grey. Boxes are clipped, to what is left of the mask if there are masks, and
    objects of which less than a pixel is left are removed.
    """
    height, width = size
    changed = dict(target)
    # What lies within the image, then padding at the bottom and right: (3, height, width).
    image = image[..., top : top + height, left : left + width]
    below, beside = height - image.shape[-2], width - image.shape[-1]
    image = F.pad(image, [0, 0, beside, below], fill=PADDING)
    if "masks" in changed:
        masks = changed["masks"][..., top : top + height, left : left + width]
        changed["masks"] = torch.nn.functional.pad(masks, (0, beside, 0, below))
    if "boxes" not in changed:
        return image, changed
    before = changed["boxes"]
    moved = before - before.new_tensor([left, top] * 2)
    boxes = clip_boxes_to_image(moved, (height - below, width - beside))
    if "masks" in changed:
        # Where a crop cuts an object, what is left of its mask may be smaller than what is left of its box.
        cut = torch.where((boxes != moved).any(dim=1) & changed["masks"].flatten(1).bool().any(dim=1))[0]
        boxes[cut] = masks_to_boxes(changed["masks"][cut]) + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (sides >= SMALLEST_SIDE).all(dim=1)
    changed["boxes"] = boxes
    if "masks" in changed:
        kept &= changed["masks"].flatten(1).bool().any(dim=1)
    if "area" in changed and "masks" in changed:
        changed["area"] = changed["masks"].flatten(1).sum(dim=1).to(changed["area"])
    elif "area" in changed:
        # Of the area of an object, the share that is left of its box is an estimate.
        whole = (before[:, 2:] - before[:, :2]).prod(dim=1)
        changed["area"] = changed["area"] * sides.prod(dim=1) / whole.clamp(min=1e-6)
    for key in ("boxes", "labels", "masks", "area", "iscrowd"):
        if key in changed:
            changed[key] = changed[key][kept]
    return image, changed

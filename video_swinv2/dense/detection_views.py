"""The ways in which a detector looks at an image in a test: its size, and mirrored or not.

Letters: N boxes, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from video_swinv2.dense.detection_transforms import fitted_size, resize


@dataclass(frozen=True)
class View:
    """One look at an image."""

    short_side: int | None = None
    """The image is scaled to this shorter side in pixels; None leaves it as it is."""
    max_side: int = 1333
    """Its longer side then has at most this many pixels."""
    flip: bool = False
    """Whether the image is mirrored left to right."""

    def show(self, image: Tensor) -> Tensor:
        """(3, H, W) -> as the network is to see it."""
        if self.short_side is not None:
            size = fitted_size((image.shape[-2], image.shape[-1]), self.short_side, self.max_side)
            image, _ = resize(image, {}, size)
        return image.flip(-1) if self.flip else image

    def boxes_in_image(self, boxes: Tensor, shown: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Boxes (N, 4) in the view, of size `shown` (H, W), as boxes in the image, of size `size`."""
        if self.flip:
            boxes = _mirrored(boxes, shown[1])
        return boxes * boxes.new_tensor([size[1] / shown[1], size[0] / shown[0]] * 2)

    def boxes_in_view(self, boxes: Tensor, shown: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The inverse of `boxes_in_image`."""
        boxes = boxes * boxes.new_tensor([shown[1] / size[1], shown[0] / size[0]] * 2)
        return _mirrored(boxes, shown[1]) if self.flip else boxes


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack((width - right, top, width - left, bottom), dim=1)

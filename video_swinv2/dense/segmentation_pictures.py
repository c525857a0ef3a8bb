"""Pictures of a segmentation: colours of classes, maps of colours, and a legend.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor

from video_swinv2.dense.segmenters import IGNORE

GOLDEN_TURN = 0.618034  # of a turn from one hue to the next, by which they stay far apart however many there are
SHADES = ((0.85, 0.95), (0.55, 0.75), (0.95, 0.6))  # saturation and value, in turn
NO_CLASS = (0, 0, 0)


def class_colours(num_classes: int) -> Tensor:
    """A colour for each class, the same in every picture: uint8 (K, 3), RGB. No class is black or white."""
    colours = []
    for number in range(num_classes):
        saturation, value = SHADES[number % len(SHADES)]
        red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN_TURN % 1, saturation, value)
        colours.append([round(255 * red), round(255 * green), round(255 * blue)])
    return torch.tensor(colours, dtype=torch.uint8)


def colour_map(classes: Tensor, num_classes: int) -> Tensor:
    """A mask (H, W) of classes as colours, uint8 (3, H, W); pixels of no class are black."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[:num_classes] = class_colours(num_classes)
    table[IGNORE] = torch.tensor(NO_CLASS, dtype=torch.uint8)
    return table.to(classes.device)[classes.long()].permute(2, 0, 1).contiguous()

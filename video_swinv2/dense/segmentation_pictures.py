"""Pictures of a segmentation: colours of classes, maps of colours, masks as files, and a legend.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from video_swinv2.dense.segmenters import IGNORE
from video_swinv2.escaping import for_terminal

GOLDEN_TURN = 0.618034  # of a turn from one hue to the next, by which they stay far apart however many there are
SHADES = ((0.85, 0.95), (0.55, 0.75), (0.95, 0.6))  # saturation and value, in turn
NO_CLASS = (0, 0, 0)
OPACITY = 0.55  # of the colours on an image
FONT_SHARE, MIN_FONT = 0.03, 11  # height of the legend's letters, as a share of the image's and in pixels
LONGEST_NAME = 24  # characters in a legend


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


def mask_image(classes: Tensor, num_classes: int) -> Image.Image:
    """A mask (H, W) as an image whose pixels are the numbers of classes, and which viewers show in their colours.

    Saved as a PNG, it is a mask that `SegmentationDataset` reads.
    """
    image = Image.fromarray(classes.cpu().numpy().astype(np.uint8), mode="P")
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[:num_classes] = class_colours(num_classes)
    image.putpalette(palette.flatten().tolist())
    return image


def overlay_with_legend(image: Tensor, classes: Tensor, names: Sequence[str]) -> Image.Image:
    """An image, uint8 (3, H, W), with the colours of its mask (H, W) on it, and a legend of its classes at the right.

    The legend has the largest class first, with its share of the pixels.
    """
    colours = colour_map(classes, len(names))
    blended = torch.where(classes == IGNORE, image, (image * (1 - OPACITY) + colours * OPACITY).to(torch.uint8))
    picture = Image.fromarray(blended.permute(1, 2, 0).cpu().numpy())
    shares = class_shares(classes, len(names))
    shown = sorted((number for number in range(len(names)) if shares[number] > 0), key=lambda number: -shares[number])
    lines = [f"{for_terminal(names[number])[:LONGEST_NAME]} {100 * shares[number]:.1f} %" for number in shown]
    size = max(round(FONT_SHARE * picture.height), MIN_FONT)
    font, line, margin = ImageFont.load_default(size), round(1.5 * size), size // 2
    width = max([round(font.getlength(text)) for text in lines], default=0) + line + 2 * margin
    sheet = Image.new("RGB", (picture.width + width, max(picture.height, line * len(lines) + margin)), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    table = class_colours(len(names))
    for place, (number, text) in enumerate(zip(shown, lines, strict=True)):
        left, top = picture.width + margin, margin + place * line
        draw.rectangle((left, top, left + size, top + size), fill=tuple(table[number].tolist()))
        draw.text((left + line, top), text, fill="black", font=font)
    return sheet


def class_shares(classes: Tensor, num_classes: int) -> list[float]:
    """The share of each class among all pixels of a mask (H, W)."""
    counts = torch.bincount(classes.flatten().long(), minlength=256)[:num_classes]
    shares: list[float] = (counts / classes.numel()).tolist()
    return shares

"""Pictures of detections: boxes with names and scores, and masks, drawn into an image.

Letters: D detections, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from video_swinv2.dense.segmentation_pictures import class_colours
from video_swinv2.escaping import for_terminal

OPACITY = 0.45  # of masks
LINE = 200  # pixels of the shorter side per pixel of line width


def draw_detections(
    image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str], min_score: float = 0.0
) -> Tensor:
    """An image, uint8 (3, H, W), with what was found in it, or with its target.

    Args:
        found: `boxes` (D, 4) and `labels` (D,), optionally `scores` (D,) and `masks`, (D, 1, H, W) or (D, H, W).
        classes: the name of label k is number k - 1.
        min_score: detections with a lower score are left out.

    Each class has a colour of its own, the same in every picture of these classes.
    """
    scores = found.get("scores")
    kept = torch.arange(len(found["labels"])) if scores is None else torch.where(scores.cpu() >= min_score)[0]
    if not len(kept):
        return image.clone()
    boxes, labels = found["boxes"].cpu()[kept], found["labels"].cpu()[kept]
    table = class_colours(len(classes))
    colours = [tuple(table[label - 1].tolist()) for label in labels.tolist()]
    names = [for_terminal(classes[label - 1]) for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.cpu()[kept].tolist(), strict=True)]
    drawn = image.cpu()
    if "masks" in found:
        masks = found["masks"].cpu()[kept].reshape(len(kept), *image.shape[-2:]) > 0.5
        drawn = draw_segmentation_masks(drawn, masks, alpha=OPACITY, colors=colours)
    width = max(round(min(image.shape[-2:]) / LINE), 1)
    result: Tensor = draw_bounding_boxes(drawn, boxes, names, colours, width=width)
    return result

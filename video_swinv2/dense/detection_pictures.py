"""Pictures of detections: boxes with names and scores, and masks, drawn into an image.

Letters: D detections, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.utils import draw_bounding_boxes

from video_swinv2.dense.detection_transforms import fitted_size, resize
from video_swinv2.dense.segmentation_pictures import class_colours
from video_swinv2.escaping import for_terminal

OPACITY = 0.45  # of masks
LONGEST = 1280  # pixels of the longer side of a picture, in which names of 10 pixels can be read
LINE = 200  # pixels of the shorter side per pixel of line width


def draw_detections(
    image: Tensor,
    found: Mapping[str, Tensor],
    classes: Sequence[str],
    min_score: float = 0.0,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """An image, uint8 (3, H, W), with what was found in it, or with its target.

    Args:
        found: `boxes` (D, 4) and `labels` (D,), optionally `scores` (D,) and `masks`, (D, 1, H, W) or (D, H, W).
        classes: the name of label k is number k - 1.
        min_score: detections with a lower score are left out.
        colours: of each detection. By default each class has its own, the same in every picture of these classes.
    """
    scores = found.get("scores")
    kept = torch.arange(len(found["labels"])) if scores is None else torch.where(scores.cpu() >= min_score)[0]
    if not len(kept):
        return image.clone()
    boxes, labels = found["boxes"].cpu()[kept], found["labels"].cpu()[kept]
    table = class_colours(len(classes)).tolist()
    chosen = [tuple(table[label - 1]) for label in labels.tolist()] if colours is None else [colours[k] for k in kept]
    names = [for_terminal(classes[label - 1]) for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.cpu()[kept].tolist(), strict=True)]
    drawn = image.cpu()
    if "masks" in found:
        masks = found["masks"].cpu()[kept].reshape(len(kept), *image.shape[-2:]) > 0.5
        drawn = _draw_masks(drawn, masks, chosen)
    width = max(round(min(image.shape[-2:]) / LINE), 1)
    result: Tensor = draw_bounding_boxes(drawn, boxes, names, chosen, width=width)
    return result


def _draw_masks(image: Tensor, masks: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """An image, uint8 (3, H, W), tinted where the masks (D, H, W) are; of several, the first is seen.

    torchvision's draw_segmentation_masks paints black where masks overlap.
    """
    painted = image.clone()
    for mask, colour in zip(masks.flip(0), reversed(colours), strict=True):
        painted[:, mask] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    blended = (image * (1 - OPACITY) + painted * OPACITY).to(torch.uint8)
    return torch.where(masks.any(dim=0), blended, image)


def detections_picture(image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """`draw_detections` of what `Detector.detect` returns, in a picture of at most LONGEST pixels: (3, h, w) uint8."""
    size = (image.shape[-2], image.shape[-1])
    on_cpu = {key: value.cpu() for key, value in found.items() if key != "masks"}
    shown, scaled = resize(image.cpu(), on_cpu, fitted_size(size, min(size), LONGEST))
    if "masks" in found:
        scaled["masks"] = paste_masks_in_image(found["masks"].cpu(), scaled["boxes"], tuple(shown.shape[-2:]))
    return draw_detections(shown, scaled, classes)

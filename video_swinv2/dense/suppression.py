"""Non-maximum suppression: which of many overlapping boxes of a class are detections.

Letters: N boxes, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

SOFT_NMS_SIGMA = 0.5  # of the Gaussian form, as in the paper
SMALLEST_BOX = 1e-2  # pixels in height and width; smaller ones are no detections, as in torchvision


@dataclass(frozen=True)
class Suppression:
    """Which boxes are kept as detections, out of all boxes of an image.

    These numbers are no part of the weights, and may be changed for every test.
    """

    min_score: float = 0.05
    """Boxes with a lower score are dropped."""
    max_overlap: float = 0.5
    """The IoU with a better box of the same class above which a box is dropped. Unused if `soft`."""
    max_detections: int = 100
    """Per image, the best of all classes."""
    soft: bool = False
    """Lower the scores of overlapping boxes instead of dropping the boxes (Soft-NMS, arXiv 1704.04503)."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4), their scores (N,) and labels (N,) -> the kept places, best first, and their scores.

        With Soft-NMS, the scores of what is kept are lower than those given.
        """
        if self.soft:
            return soft_nms(boxes, scores, labels, self.min_score, self.max_detections)
        kept = torch.where(scores > self.min_score)[0]
        kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], self.max_overlap)][: self.max_detections]
        return kept, scores[kept]


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, min_score: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Soft-NMS with Gaussian decay: the kept places, best first, and their lowered scores.

    The best box is kept, and the score of every other box of its class is multiplied by exp(-IoU**2 / sigma). This
    repeats with the best of the remaining boxes until `max_detections` are kept or no score is above `min_score`.
    """
    kept: list[Tensor] = []
    found: list[Tensor] = []
    # Decay only lowers scores, so that a box which begins below the limit can be left out at once.
    places = torch.where(scores > min_score)[0]
    boxes, scores, labels = boxes[places], scores[places].clone(), labels[places]
    while len(kept) < max_detections and len(scores) and scores.max() > min_score:
        best = scores.argmax()
        kept.append(places[best])
        found.append(scores[best].clone())
        overlap = box_iou(boxes[best][None], boxes)[0]  # (N,)
        scores *= torch.where(labels == labels[best], torch.exp(-overlap.square() / SOFT_NMS_SIGMA), 1.0)
        scores[best] = -1.0  # not again
    if not kept:
        return places[:0], scores[:0]
    return torch.stack(kept), torch.stack(found)


def detections(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], suppression: Suppression
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of an image: boxes (M, 4), scores (M,) and labels (M,) from 1, best first.

    Args:
        boxes: (N, K + 1, 4), a box for every class, of which class 0 is the background.
        scores: (N, K + 1), which sum to 1.
        size: (height, width) of the image in pixels, to which boxes are clipped.
    """
    boxes = clip_boxes_to_image(boxes, size)[:, 1:].reshape(-1, 4)
    labels = torch.arange(1, scores.shape[1], device=scores.device).expand(len(scores), -1).reshape(-1)
    scores = scores[:, 1:].reshape(-1)
    kept = remove_small_boxes(boxes, SMALLEST_BOX)
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    kept, scores = suppression(boxes, scores, labels)
    return boxes[kept], scores, labels[kept]

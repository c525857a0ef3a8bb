"""The heads that classify and refine proposals, in one stage (Faster and Mask R-CNN) or several (Cascade R-CNN).

Letters: R proposals of an image, K classes without the background, which is class 0, C channels, H W the image.

Each stage is torchvision's `RoIHeads`: its matching of boxes, its sampling, its coding of boxes and its losses. What is
here runs the stages one after the other, each on the boxes that the one before it has refined, with a higher IoU
required of a positive (arXiv 1712.00726). With one stage it computes what `RoIHeads.forward` does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.poolers import LevelMapper

from video_swinv2.dense.proposals import Sampler
from video_swinv2.dense.suppression import SMALLEST_BOX, Suppression, detections

# Per stage: the IoU of a positive, the weights that deltas are scaled by, and the weight of the loss. The IoUs and the
# scales are the paper's, and the loss weights those of mmdetection, with which the results of Swin were trained.
STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)
POSITIVE_FRACTION = 0.25  # of the proposals that the loss is computed on
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # a box of 224 pixels is read from the map of stride 2**4 (arXiv 1612.03144)


class BoxPredictor(nn.Module):
    """Class logits and box deltas from the features of a proposal; module names are torchvision's.

    class_agnostic: the deltas do not depend on the class.
    """

    def __init__(self, channels: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.repeats = num_classes + 1 if class_agnostic else 1
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 if class_agnostic else 4 * (num_classes + 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) -> logits (R, K + 1) and deltas (R, 4 * (K + 1)), float32 under autocast too.

        Deltas that do not depend on the class are repeated for each, so that torchvision's functions can take them.
        """
        return self.cls_score(features).float(), self.bbox_pred(features).float().repeat(1, self.repeats)


class CascadeHeads(nn.Module):
    """Box heads of one or more stages, and optionally a mask head, for one image at a time.

    Args:
        channels: of the maps.
        head_channels: of the two hidden layers of each box head.
        num_classes: K, without the background.
        stages: their number; with more than one, boxes are refined irrespective of their class.
        mask_channels: of the hidden layers of the mask head; None for no mask head. As in detectron2, there is one for
            all stages, trained on the boxes of the first.
        strides: the pixels per token of the maps that boxes are read from.
        sampled_boxes: proposals per image that the loss is computed on.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        num_classes: int,
        *,
        stages: int,
        mask_channels: int | None,
        strides: Sequence[int],
        sampled_boxes: int,
    ) -> None:
        super().__init__()
        self.suppression = Suppression()
        """Which boxes are kept as detections; may be replaced at any time."""
        self.loss_weights = [weight for _, _, weight in STAGES[:stages]]
        self.stages = nn.ModuleList(
            _stage(channels, head_channels, num_classes, stages > 1, strides, sampled_boxes, overlap, scales)
            for overlap, scales, _ in STAGES[:stages]
        )
        self.mask_roi_pool = self.mask_head = self.mask_predictor = None
        if mask_channels is not None:
            self.mask_roi_pool = _roi_pool(14, strides)
            self.mask_head = MaskRCNNHeads(channels, (mask_channels,) * 4, dilation=1)
            self.mask_predictor = MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1)

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: Tensor,
        size: tuple[int, int],
        target: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The detections of an image (empty in training) and the losses (empty otherwise).

        Args:
            features: the maps by name, (1, C, H_i, W_i).
            proposals: (R, 4) in pixels.
            size: (height, width) of the image in pixels.
            target: in training, `boxes` (M, 4), `labels` (M,) from 1 and, for a mask head, `masks` (M, H, W).

        Detections are `boxes` (D, 4), `labels` (D,) from 1, `scores` (D,), best first, and, with a mask head, `masks`
        (D, 1, 28, 28), the probabilities of the mask within each box.
        """
        if self.training:
            if target is None:
                raise ValueError("targets: none in training; pass them, or call eval()")
            return {}, self._losses(features, proposals, size, target)
        boxes, scores, labels = detections(*self.candidates(features, proposals, size), size, self.suppression)
        found = {"boxes": boxes, "labels": labels, "scores": scores}
        if self.mask_roi_pool is not None:
            found["masks"] = self.masks(features, boxes, labels, size)
        return found, {}

    def _losses(
        self, features: Mapping[str, Tensor], proposals: Tensor, size: tuple[int, int], target: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        stages = [stage for stage in self.stages if isinstance(stage, RoIHeads)]
        # Lists have one item per image, as torchvision's functions take them.
        boxes, matched, labels, goals = stages[0].select_training_samples([proposals], [dict(target)])
        losses = {}
        if self.mask_roi_pool is not None:
            losses["loss_mask"] = self._mask_loss(features, boxes[0], matched[0], labels[0], size, target)
        totals = [proposals.new_zeros(()), proposals.new_zeros(())]
        for stage, following, weight in zip(stages, [*stages[1:], None], self.loss_weights, strict=True):
            logits, deltas = _predict(stage, features, boxes[0], size)
            parts = fastrcnn_loss(logits, deltas, labels, goals)
            totals = [total + weight * part for total, part in zip(totals, parts, strict=True)]
            if following is not None:
                refined = _refined(stage, deltas.detach(), boxes[0], size)
                refined = refined[remove_small_boxes(refined, SMALLEST_BOX)]  # no delta could be computed from them
                boxes, labels, goals = _matched(following, refined, target)
        return {"loss_classifier": totals[0], "loss_box_reg": totals[1]} | losses

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        boxes: Tensor,
        matched: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        target: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss of the masks of the boxes that are positives, which may be none."""
        positive = torch.where(labels > 0)[0]
        logits = self._mask_logits(features, boxes[positive], size)
        return maskrcnn_loss(logits, [boxes[positive]], [target["masks"]], [target["labels"]], [matched[positive]])

    def _mask_logits(self, features: Mapping[str, Tensor], boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """(D, 4) -> (D, K + 1, 28, 28), float32."""
        if self.mask_roi_pool is None or self.mask_head is None or self.mask_predictor is None:
            raise ValueError("a detector without a mask head has no masks")
        pooled = self.mask_roi_pool(features, [boxes], [size])
        return self.mask_predictor(self.mask_head(pooled)).float()

    def candidates(
        self, features: Mapping[str, Tensor], proposals: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Every proposal of an image as a box of every class, (R, K + 1, 4) in pixels, and the scores (R, K + 1)."""
        stages = [stage for stage in self.stages if isinstance(stage, RoIHeads)]
        scores = []
        boxes = proposals
        for stage in stages:
            logits, deltas = _predict(stage, features, boxes, size)
            scores.append(F.softmax(logits, dim=-1))
            decoded = stage.box_coder.decode(deltas, [boxes])  # (R, K + 1, 4)
            if stage is not stages[-1]:
                boxes = _refined(stage, deltas, boxes, size)
        # All stages have a say in what a box is, and the last one in where it is.
        return decoded, torch.stack(scores).mean(dim=0)

    def masks(self, features: Mapping[str, Tensor], boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """The masks of detections, boxes (D, 4) and labels (D,): probabilities within each box, (D, 1, 28, 28)."""
        probabilities: Tensor = maskrcnn_inference(self._mask_logits(features, boxes, size), [labels])[0]
        return probabilities


def _stage(
    channels: int,
    head_channels: int,
    num_classes: int,
    class_agnostic: bool,
    strides: Sequence[int],
    sampled_boxes: int,
    overlap: float,
    scales: tuple[float, float, float, float],
) -> RoIHeads:
    side = 7
    stage = RoIHeads(
        _roi_pool(side, strides),
        TwoMLPHead(channels * side**2, head_channels),
        BoxPredictor(head_channels, num_classes, class_agnostic),
        fg_iou_thresh=overlap,
        bg_iou_thresh=overlap,
        batch_size_per_image=sampled_boxes,
        positive_fraction=POSITIVE_FRACTION,
        bbox_reg_weights=scales,
        # Unused: detections are made from all stages together, by `Suppression`.
        score_thresh=0.0,
        nms_thresh=1.0,
        detections_per_img=0,
    )
    stage.fg_bg_sampler = Sampler(sampled_boxes, POSITIVE_FRACTION)
    return stage


def _roi_pool(side: int, strides: Sequence[int]) -> MultiScaleRoIAlign:
    """RoIAlign to `side` x `side` from the maps of these strides, which are called "0", "1", ..."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], side, sampling_ratio=2)
    # Otherwise torchvision guesses the strides from the sizes of the first image that it ever sees, and for a small one
    # the guess is wrong: 33 pixels give 2 tokens of 32, for which it takes them to be of 16.
    pool.scales = [1 / stride for stride in strides]
    levels = [stride.bit_length() - 1 for stride in strides]
    pool.map_levels = LevelMapper(levels[0], levels[-1], CANONICAL_SIZE, CANONICAL_LEVEL)
    return pool


def _predict(
    stage: RoIHeads, features: Mapping[str, Tensor], boxes: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(R, 4) -> logits (R, K + 1) and deltas (R, 4 * (K + 1))."""
    pooled = stage.box_roi_pool(OrderedDict(features), [boxes], [size])
    logits, deltas = stage.box_predictor(stage.box_head(pooled))
    return logits, deltas


def _refined(stage: RoIHeads, deltas: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The boxes (R, 4) moved by deltas that do not depend on the class, and clipped to the image."""
    moved = stage.box_coder.decode(deltas, [boxes])[:, 0]  # (R, K + 1, 4), all classes equal, -> (R, 4)
    return clip_boxes_to_image(moved, size)


def _matched(
    stage: RoIHeads, boxes: Tensor, target: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """All boxes of the stage before, with the labels and the deltas that this stage should find for them."""
    true_boxes = target["boxes"].to(boxes.dtype)
    matched, labels = stage.assign_targets_to_proposals([boxes], [true_boxes], [target["labels"]])
    if not len(true_boxes):
        true_boxes = boxes.new_zeros((1, 4))  # never used: without true boxes, every box is background
    return [boxes], labels, list(stage.box_coder.encode([true_boxes[matched[0]]], [boxes]))

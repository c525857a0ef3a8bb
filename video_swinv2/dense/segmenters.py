"""Semantic segmentation on the pyramid of SwinV2: UPerNet around an image model.

Letters: B batch, K classes, H W pixels, H_1 W_1 the grid of the first stage.

    images (B, 3, H, W) -> PyramidBackbone: four maps -> UPerHead (B, K, H_1, W_1) -> logits (B, K, H, W)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.dense.pyramid import PyramidBackbone
from video_swinv2.dense.upernet import CHANNELS_STEP, AuxiliaryHead, Norm, UPerHead, enlarged
from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2
from video_swinv2.models.variants import create_model

IGNORE = 255  # the index of pixels that belong to no class: they add nothing to a loss and do not count in a test
MAX_CLASSES = 255  # so that indices and IGNORE are bytes


@dataclass(frozen=True)
class SegmenterDesign:
    """What a segmenter is, beside its backbone. Model files record it.

    Raises ValueError for values that no segmenter has.
    """

    num_classes: int
    """K."""
    channels: int = 512
    """Channels of the UPerNet head, a multiple of 64; the auxiliary head has half as many."""
    auxiliary: bool = True
    """Whether there is an auxiliary head, for the loss."""
    dropout: float = 0.0
    """Rate of dropout of channels before the classifiers, in training."""
    norm: Norm = "group"
    """The norm of the heads; `upernet.py` says why it is not batch norm, which published weights have."""
    short_side: int | None = None
    """Pixels to which the shorter side of an image was scaled for training, and is in tests; None keeps its size."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes: invalid value {self.num_classes}; give a number from 1 to {MAX_CLASSES}")
        if self.channels < 1 or self.channels % CHANNELS_STEP:
            raise ValueError(f"channels: {self.channels} is not a positive multiple of {CHANNELS_STEP}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: invalid value {self.dropout}; give a rate from 0 to below 1")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side: invalid value {self.short_side}; give a positive number of pixels")
        if self.norm not in ("group", "batch"):
            raise ValueError(f"norm: {self.norm!r} is not one of group, batch")


class Segmenter(nn.Module):
    """UPerNet around a SwinV2 for images.

    encoder: a `features_only` model. Its weights are loaded with `load_weights(segmenter.encoder, path)`.
    """

    def __init__(self, encoder: SwinV2, design: SegmenterDesign) -> None:
        super().__init__()
        if encoder.frames is not None:
            raise ValueError("frames: a segmenter takes images; omit frames")
        self.design = design
        self.backbone = PyramidBackbone(encoder)
        inputs, classes, dropout, norm = self.backbone.channels, design.num_classes, design.dropout, design.norm
        self.head = UPerHead(inputs, design.channels, classes, dropout, norm)
        self.auxiliary = (
            AuxiliaryHead(inputs, design.channels // 2, classes, dropout, norm) if design.auxiliary else None
        )

    @property
    def encoder(self) -> SwinV2:
        """The SwinV2, a part of the backbone."""
        return self.backbone.encoder

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits; () if unknown."""
        return self.encoder.classes

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        if names and len(names) != self.design.num_classes:
            raise ValueError(f"classes: {len(names)} names for {self.design.num_classes} classes; give one per class")
        self.encoder.classes = tuple(names)

    def dense_design(self) -> dict[str, object]:
        """What model files record beside the architecture of the encoder, as plain data."""
        return {"task": "segmentation", **dataclasses.asdict(self.design)}

    def forward(
        self, images: Tensor, masks: Tensor | None = None, class_weights: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Normalised images (B, 3, H, W) of any size -> logits (B, K, H, W); with `masks`, the losses instead.

        masks: int64 (B, H, W), the class of every pixel, or 255 for pixels that belong to none. The losses are
            `loss` and, with an auxiliary head, `auxiliary_loss`, scalars: the cross-entropy summed over the pixels of
            a class and divided by the number of all pixels, as in mmsegmentation. So the mean over several batches
            of equal size is that of all their images, however many of their pixels belong to no class.
        class_weights: (K,), what the loss of the pixels of each class is multiplied by.
        """
        maps = self.backbone(images)
        logits = self._full_size(self.head(maps), images, stage=0)
        if masks is None:
            return logits
        losses = {"loss": pixel_loss(logits, masks, class_weights)}
        if self.auxiliary is not None:
            scores = self._full_size(self.auxiliary(maps), images, stage=2)
            losses["auxiliary_loss"] = pixel_loss(scores, masks, class_weights)
        return losses

    def _full_size(self, scores: Tensor, images: Tensor, stage: int) -> Tensor:
        """Scores per token of a stage (B, K, H_i, W_i) -> per pixel of the images (B, K, H, W).

        An image that is no multiple of the token is padded at the bottom and right. The tokens cover the padding too,
        so the scores are enlarged to all that they cover, and cropped.
        """
        stride = self.backbone.strides[stage]
        height, width = images.shape[2:]
        covered = [stride * tokens for tokens in scores.shape[2:]]
        return enlarged(scores, covered)[..., :height, :width]


def pixel_loss(logits: Tensor, masks: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (B, K, H, W) and masks (B, H, W), summed and divided by B H W, pixels of IGNORE included.

    In fp32, whatever the dtype of the logits. class_weights: (K,), factors on the loss of the pixels of each class.
    """
    total = F.cross_entropy(logits.float(), masks, class_weights, ignore_index=IGNORE, reduction="sum")
    return total / math.prod(masks.shape)


def create_segmenter(
    name: str,
    *,
    num_classes: int,
    image_size: IntOrPerAxis = 512,
    window: IntOrPerAxis | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    drop_path: float = 0.0,
    attention: Backend = "auto",
    checkpoint_blocks: int = 0,
    channels: int = 512,
    auxiliary: bool = True,
    dropout: float = 0.0,
    norm: Norm = "group",
    short_side: int | None = None,
) -> Segmenter:
    """Create a freshly initialised segmenter: images (B, 3, H, W), normalised -> logits (B, num_classes, H, W).

    Args:
        name: one of `list_models()`, the backbone.
        num_classes: number of classes, at most 255; pixels of no class have the index 255.
        image_size: the size of the crops that it is trained on, in pixels; images of any other size work too.
        window, cpb_norm, drop_path, attention, checkpoint_blocks: as in `create_model`.
        channels, auxiliary, dropout, norm, short_side: as in `SegmenterDesign`.

    `load_weights(segmenter.encoder, path)` starts it from pre-trained weights. Raises ValueError for an unknown name
    and for sizes that do not fit together.
    """
    design = SegmenterDesign(num_classes, channels, auxiliary, dropout, norm, short_side)
    encoder = create_model(
        name,
        image_size=image_size,
        window=window,
        cpb_norm=cpb_norm,
        drop_path=drop_path,
        attention=attention,
        checkpoint_blocks=checkpoint_blocks,
        features_only=True,
    )
    return Segmenter(encoder, design)

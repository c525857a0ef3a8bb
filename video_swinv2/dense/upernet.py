"""The heads of UPerNet (arXiv 1807.10221): pyramid pooling, a feature pyramid and their fusion; and the auxiliary head.

Letters: B batch, C_i channels and H_i W_i grid of the backbone's map i, C channels of the head, K classes.

    map 4 -> PyramidPooling -> P4 (B, C, H_4, W_4)
    P_i = 1 x 1 convolution of map i + P_(i+1), enlarged to H_i W_i          from the top down
    3 x 3 convolution of each but the last, all enlarged to H_1 W_1, concatenated, fused by a 3 x 3 convolution
    -> a score per class and token (B, K, H_1, W_1)

The architecture is that of mmsegmentation and transformers, except for the norm. Theirs is batch norm, whose statistics
would be those of the one or two images of a micro-batch, and would make the result of a step depend on how its batch is
divided among processes and micro-batches; synchronised batch norm would still depend on the micro-batch, and runs on
GPUs only. Group norm (arXiv 1803.08494) has no statistics over the batch and nothing but its weights to save: a run on
two processes, or one that is resumed, computes what a single one does. It is also defined for the 1 x 1 map of the
pooling and a micro-batch of one image, for which batch norm is not. With `norm="batch"`, the heads are exactly those of
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["group", "batch"]
GROUPS = 32  # of channels, the default of the group norm paper,
MIN_GROUP = 8  # but with at least so many channels in each: narrow heads learn worse with fewer groups or smaller ones
CHANNELS_STEP = 64  # of the main head, so that the groups divide them and the half of them
POOL_SIZES = (1, 2, 3, 6)  # tokens along each side of the pooled maps
AUXILIARY_STAGE = 2  # from 0; the third map


class ConvNorm(nn.Sequential):
    """Convolution without bias, norm and ReLU; a kernel of 3 pads by 1. (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: Norm) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
            nn.GroupNorm(min(GROUPS, out_channels // MIN_GROUP), out_channels)
            if norm == "group"
            else nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class PyramidPooling(nn.Module):
    """The pyramid pooling module of PSPNet: the map beside its means over 1, 4, 9 and 36 parts, fused."""

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNorm(in_channels, channels, 1, norm)) for size in POOL_SIZES
        )
        self.fuse = ConvNorm(in_channels + len(POOL_SIZES) * channels, channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_4, H_4, W_4) -> (B, C, H_4, W_4)."""
        pooled = [enlarged(pool(x), x.shape[2:]) for pool in self.pools]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class UPerHead(nn.Module):
    """The main head of UPerNet.

    in_channels: C_i of the backbone's maps. dropout: the rate of whole channels before the classifier, in training.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.0, norm: Norm = "group"
    ) -> None:
        super().__init__()
        *lower, last = in_channels
        self.pooling = PyramidPooling(last, channels, norm)
        self.laterals = nn.ModuleList(ConvNorm(width, channels, 1, norm) for width in lower)
        self.smoothings = nn.ModuleList(ConvNorm(channels, channels, 3, norm) for _ in lower)
        self.fuse = ConvNorm(len(in_channels) * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's maps (B, C_i, H_i, W_i), the largest first -> scores (B, K, H_1, W_1)."""
        merged = [lateral(below) for lateral, below in zip(self.laterals, maps, strict=False)]
        merged.append(self.pooling(maps[-1]))
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + enlarged(merged[i], merged[i - 1].shape[2:])
        smooth = [smoothing(below) for smoothing, below in zip(self.smoothings, merged, strict=False)]
        smooth.append(merged[-1])
        fused = self.fuse(torch.cat([enlarged(each, smooth[0].shape[2:]) for each in smooth], dim=1))
        return self.classifier(self.dropout(fused))


class AuxiliaryHead(nn.Module):
    """The head whose loss is added in training: a convolution of the third map and a classifier (FCN)."""

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.0, norm: Norm = "group"
    ) -> None:
        super().__init__()
        self.convolution = ConvNorm(in_channels[AUXILIARY_STAGE], channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's maps (B, C_i, H_i, W_i) -> scores (B, K, H_3, W_3)."""
        return self.classifier(self.dropout(self.convolution(maps[AUXILIARY_STAGE])))


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear; pixels are areas, whose corners coincide (align_corners=False)."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, list(size), mode="bilinear", align_corners=False)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1 x 1 convolution with mmsegmentation's initial values: all classes are about equally likely at first."""
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]  # it has one
    return classifier

"""Pixels: crops and augmentation of clips (every frame alike), mixing of batches, normalisation on the device.

Letters: B batch, T frames, H W pixels, K classes. All from torchvision.transforms.v2, which treats the leading axis of
(T, 3, H, W) as one thing and so applies one random draw to all frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from video_swinv2.config import AugmentConfig

Size = tuple[int, int]
GREY = (124, 116, 104)  # ImageNet's mean, which normalisation turns into 0


def training_transform(augment: AugmentConfig, size: Size) -> v2.Transform:
    """(T, 3, H, W) uint8 -> (T, 3, *size) uint8: crop, flip, RandAugment, erasing, one draw per clip."""
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(size, scale=augment.crop_area, ratio=augment.crop_ratio, antialias=True)
    ]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.rand_augment:
        steps.append(v2.RandAugment(augment.rand_augment, augment.rand_magnitude, fill=list(GREY)))
    if augment.erasing:
        steps.append(v2.RandomErasing(augment.erasing, value=list(GREY)))
    return v2.Compose(steps)


def validation_transform(size: Size) -> v2.Transform:
    """(T, 3, H, W) uint8 -> (T, 3, *size): short side to 256/224 of the size, centre crop (Video Swin's validation)."""
    return v2.Compose([v2.Resize(round(min(size) * 256 / 224), antialias=True), v2.CenterCrop(size)])


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, ...) uint8 -> float32, (pixel / 255 - mean) / std per channel, on the device the pixels are on."""
    shape = (1, 3) + (1,) * (pixels.ndim - 2)
    scale = torch.tensor(std, device=pixels.device).view(shape)
    return (pixels.float() / 255 - torch.tensor(mean, device=pixels.device).view(shape)) / scale


def mix(inputs: Tensor, labels: Tensor, classes: int, augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix within a batch: (B, 3, ...) float and (B,) labels -> inputs and (B, K) class shares.

    Where both are on, each batch gets one of them, with equal chance.
    """
    kinds: list[torch.nn.Module] = []
    if augment.mixup:
        kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        kinds.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    if not kinds:
        return inputs, torch.nn.functional.one_hot(labels, classes).to(inputs.dtype)
    if inputs.ndim == 5:
        inputs = tv_tensors.Video(inputs)  # without it five axes are refused; where time stands does not matter here
    mixed, shares = v2.RandomChoice(kinds)(inputs, labels)
    return mixed.as_subclass(Tensor), shares

"""Transforms of pixels: crops and augmentation of clips, Mixup and CutMix of batches, and normalisation on the device.

Letters: B batch, T frames, H W pixels, K classes.

Built on torchvision.transforms.v2, which treats the leading axes of (T, 3, H, W) as a batch, so one random draw applies
to all frames of a clip. RandAugment and the pixel mode of random erasing are implemented here, because torchvision's
versions differ from those of the published recipes (see `RandAugment` and `Erasing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from video_swinv2.config import AugmentConfig
from video_swinv2.data.display import Box
from video_swinv2.errors import UsageError

__all__ = ["Erasing", "RandAugment", "denormalise", "mix", "normalise", "training_transform", "validation_transform"]

Size = tuple[int, int]
GREY = (124, 116, 104)  # ImageNet's mean, for pixels from 0 to 255; normalisation turns it into about 0
DEVIATION = (58, 57, 57)  # ImageNet's standard deviation, likewise
MAX_MAGNITUDE = 10.0  # RandAugment's strongest magnitude, as in timm


class TrainingTransform(nn.Module):
    """The training augmentation: crop, flip, RandAugment, random erasing. Each of them draws once per clip.

    Crops are resized bilinearly with antialiasing, as in Microsoft's SimMIM recipes; the supervised recipes resize
    bicubically. Calling `draw_crop`, cutting the crop elsewhere and calling `finish` gives the same as `forward`, so
    that a reader need not convert what lies outside the crop.
    """

    def __init__(self, augment: AugmentConfig, size: Size) -> None:
        super().__init__()
        self.size = size
        self.crop = v2.RandomResizedCrop(size, scale=augment.crop_area, ratio=augment.crop_ratio)
        steps: list[nn.Module] = []
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.rand_augment:
            steps.append(RandAugment(augment.rand_augment, augment.rand_magnitude, augment.rand_noise))
        if augment.erasing:
            steps.append(Erasing(augment.erasing))
        self.steps = nn.Sequential(*steps)

    def forward(self, clip: Tensor) -> Tensor:
        """(T, 3, H, W) uint8 -> (T, 3, *size) uint8."""
        return self.finish(F.crop(clip, *self.draw_crop(*clip.shape[-2:])))

    def draw_crop(self, height: int, width: int) -> Box:
        """The crop of a clip whose frames have this size."""
        # torchvision asks a tensor for its size and takes only that from it; on "meta" it has no pixels.
        drawn = self.crop.make_params([torch.empty(3, height, width, device="meta")])
        return drawn["top"], drawn["left"], drawn["height"], drawn["width"]

    def finish(self, crop: Tensor) -> Tensor:
        """What follows after cutting the crop: (T, 3, height, width) uint8 -> (T, 3, *size) uint8."""
        augmented: Tensor = self.steps(F.resize(crop, list(self.size), antialias=True))
        return augmented


def training_transform(augment: AugmentConfig, size: Size) -> TrainingTransform:
    """The training augmentation, (T, 3, H, W) uint8 -> (T, 3, *size) uint8."""
    return TrainingTransform(augment, size)


def validation_transform(size: Size) -> v2.Transform:
    """The validation transform of Video Swin, (T, 3, H, W) uint8 -> (T, 3, *size) uint8.

    Resizes the short side to 256/224 of the shorter side of `size`, then crops the centre.
    """
    return v2.Compose([v2.Resize(round(min(size) * 256 / 224), antialias=True), v2.CenterCrop(size)])


class RandAugment(nn.Module):
    """timm's `rand-m{magnitude}-n{operations}-mstd{noise}-inc1` on (T, 3, H, W) uint8, with one draw for all frames.

    `operations` operations are drawn with replacement. Each is applied with probability 0.5, at a magnitude drawn from
    normal(magnitude, noise) and clipped to 0..10. Every operation gets stronger with its magnitude ("inc").

    torchvision's RandAugment is a different augmentation of the same name: its magnitude 9 is 9/30 of the range, where
    timm's is 9/10. It always applies the operations that it draws, adds no noise to the magnitude, and has an identity
    operation but neither invert nor solarize-add.

    Differences from timm: geometric operations are bilinear (timm: bilinear or bicubic), because torchvision has no
    bicubic ones for tensors, and contrast, autocontrast and equalize work on each frame separately.
    """

    def __init__(self, operations: int, magnitude: float = 9.0, noise: float = 0.5) -> None:
        super().__init__()
        self.operations, self.magnitude, self.noise = operations, magnitude, noise

    def forward(self, clip: Tensor) -> Tensor:
        """(T, 3, H, W) uint8 -> the same shape and dtype."""
        for _ in range(self.operations):
            name = list(OPERATIONS)[int(torch.randint(len(OPERATIONS), ()))]
            # The magnitude is drawn even if the operation is not applied, so each turn uses the same number of draws.
            applied, sign = torch.rand(2) < 0.5
            magnitude = float(torch.normal(self.magnitude, self.noise, ()).clamp(0.0, MAX_MAGNITUDE))
            if applied:
                clip = OPERATIONS[name](clip, magnitude / MAX_MAGNITUDE, -1 if sign else 1)
        return clip


def _solarize_add(clip: Tensor, level: float, _: int) -> Tensor:
    """Brighten dark pixels: add up to 110 to values below 128, which then stay below 256."""
    return torch.where(clip < 128, clip + int(level * 110), clip)


def _equalize(clip: Tensor) -> Tensor:
    """Equalize the histogram of each colour of each frame, as Pillow and torchvision do, in a third of its time."""
    equalized = torch.empty(clip.shape, dtype=clip.dtype)  # contiguous, whatever the clip is
    # torchvision converts all pixels to int64 to count them and to look them up; NumPy does both on uint8.
    for plane, result in zip(clip.flatten(0, 1).numpy(), equalized.flatten(0, 1).numpy(), strict=True):
        counts = np.bincount(plane.ravel(), minlength=256)
        # One level of the result stands for so many pixels; those of the largest value do not count.
        step = (plane.size - int(counts[np.flatnonzero(counts)[-1]])) // 255
        if not step:
            result[:] = plane
            continue
        levels = (np.cumsum(counts)[:-1] + step // 2) // step
        table = np.concatenate([[0], levels]).clip(0, 255).astype(np.uint8)  # a value takes the level of those below
        np.take(table, plane, out=result)
    return equalized


def _sharpness(clip: Tensor, factor: float) -> Tensor:
    """Blend with a blurred clip, as torchvision's `adjust_sharpness` does to the bit, in a third of its time.

    The blur weighs a pixel and its eight neighbours 5 to 1. Pixels at the border are not changed.
    """
    if min(clip.shape[-2:]) < 3:
        return clip
    # Sums of integers instead of a convolution of floats. A thirteenth of one is never halfway between two integers, so
    # rounding it gives what rounding the convolution gives.
    pixels = clip.to(torch.int16)
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[..., 1:-1, 1:-1]
    blurred = total.to(torch.float32).div_(13).round_()
    inner = clip[..., 1:-1, 1:-1].to(torch.float32)
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor).clamp_(0, 255)
    result = clip.clone()
    result[..., 1:-1, 1:-1] = inner.to(clip.dtype)
    return result


def _warp(change: Callable[[Tensor, list[int]], Tensor], clip: Tensor) -> Tensor:
    """Apply a geometric change, `change(image, fill)`, to a clip; pixels from outside the frames are grey."""
    # As one image of 3 T channels, for which positions and weights are computed once, and not for each frame.
    return change(clip.flatten(0, 1), list(GREY) * len(clip)).view_as(clip)


def _rotate(clip: Tensor, degrees: float) -> Tensor:
    mode = v2.InterpolationMode.BILINEAR
    return _warp(lambda image, fill: F.rotate(image, degrees, interpolation=mode, fill=fill), clip)


def _affine(clip: Tensor, x: float = 0.0, y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0) -> Tensor:
    """Translate by (x, y) pixels and shear by the given tangents about the upper left corner, as in timm."""
    # torchvision takes angles in degrees.
    shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
    mode = v2.InterpolationMode.BILINEAR
    return _warp(
        lambda image, fill: F.affine(image, 0.0, [x, y], 1.0, shear, interpolation=mode, fill=fill, center=[0, 0]),
        clip,
    )


def _enhancement(change: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float, int], Tensor]:
    """Make an operation of `change(clip, factor)`; the factor goes from 1 at level 0 to 0.1 or 1.9 at level 1."""
    return lambda clip, level, sign: change(clip, max(0.1, 1.0 + sign * 0.9 * level))


# timm's `inc1` set: (clip, level from 0 to 1, sign -1 or 1) -> clip. Level 1 is a rotation by 30 degrees, a shear with
# tangent 0.3, a translation by 45 % of a side, and a solarize threshold of 0. The order matters: operations are drawn
# by position, so a different order would change every seeded run.
OPERATIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "autocontrast": lambda clip, level, sign: F.autocontrast(clip),
    "equalize": lambda clip, level, sign: _equalize(clip),
    "invert": lambda clip, level, sign: F.invert(clip),
    "rotate": lambda clip, level, sign: _rotate(clip, sign * 30.0 * level),
    # Keep at least one bit. At level 1, timm asks for none, which gave a black image in earlier versions of Pillow and
    # is an error in current ones.
    "posterize": lambda clip, level, sign: F.posterize(clip, max(1, 4 - int(4 * level))),
    "solarize": lambda clip, level, sign: F.solarize(clip, 256 - int(256 * level)),
    "solarize_add": _solarize_add,
    "color": _enhancement(F.adjust_saturation),
    "contrast": _enhancement(F.adjust_contrast),
    "brightness": _enhancement(F.adjust_brightness),
    "sharpness": _enhancement(_sharpness),
    "shear_x": lambda clip, level, sign: _affine(clip, shear_x=sign * 0.3 * level),
    "shear_y": lambda clip, level, sign: _affine(clip, shear_y=sign * 0.3 * level),
    "translate_x": lambda clip, level, sign: _affine(clip, x=sign * 0.45 * level * clip.shape[-1]),
    "translate_y": lambda clip, level, sign: _affine(clip, y=sign * 0.45 * level * clip.shape[-2]),
}


class Erasing(nn.Module):
    """Random erasing in the recipes' `pixel` mode: fills one rectangle of a clip with noise, the same in all frames.

    torchvision draws the rectangle and standard normal noise, which is meant for normalised inputs. Erasing comes
    before normalisation here, so the noise is converted to pixel values: scaled, rounded, and clipped to 0..255, which
    affects 3 % of the values.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.rectangle = v2.RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def forward(self, clip: Tensor) -> Tensor:
        """(T, 3, H, W) uint8 -> the same shape and dtype."""
        # i, j, h, w and the noise v, (3, h, w); v is None if none of ten draws gave a rectangle inside the picture.
        drawn = self.rectangle.make_params([clip])
        if torch.rand(()) >= self.probability or drawn["v"] is None:
            return clip
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (GREY, DEVIATION))
        drawn["v"] = (drawn["v"] * deviation + mean).round().clamp(0, 255).to(clip.dtype)
        erased: Tensor = F.erase(clip, **drawn)
        return erased


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, ...) uint8 -> float32 of the same shape and on the same device, (pixel / 255 - mean) / std per channel."""
    # In place, because on a CPU allocating memory for each result takes three times as long as the arithmetic.
    result = pixels.to(torch.float32, copy=True)
    # Multiplying mean and std by 255 saves dividing the pixels. The products are rounded to float32, but are Python
    # numbers: tensors of them would be copied to the GPU, and each micro-batch would wait for that.
    mean_255, std_255 = ((255 * torch.tensor(numbers)).tolist() for numbers in (mean, std))
    for channel in range(len(mean_255)):
        result[:, channel].sub_(mean_255[channel]).div_(std_255[channel])
    return result


def denormalise(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalise`, (B, 3, ...) float -> uint8; values are rounded and clipped to 0..255."""
    shape = (1, 3) + (1,) * (inputs.ndim - 2)
    scale = torch.tensor(std, device=inputs.device).view(shape)
    pixels = (inputs * scale + torch.tensor(mean, device=inputs.device).view(shape)) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8)


def mix(inputs: Tensor, labels: Tensor, classes: int, augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Apply Mixup or CutMix to a batch: (B, 3, ...) float and (B,) labels -> inputs, and class shares (B, K) float.

    If both are enabled, each batch gets one of them, with equal probability. torchvision mixes each sample with the one
    before it, whereas timm mixes the first with the last, the second with the second to last, and so on. Label
    smoothing is applied in the loss, which gives exactly the smoothed shares of timm. Raises UsageError for a batch of
    one sample, which cannot be mixed.
    """
    kinds: list[nn.Module] = []
    if augment.mixup:
        kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        kinds.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    if not kinds:
        return inputs, torch.nn.functional.one_hot(labels, classes).to(inputs.dtype)
    if len(inputs) == 1:
        raise UsageError("augment.mixup, cutmix: a micro-batch of 1 has nothing to mix with; set them to 0, or use 2")
    if inputs.ndim == 5:
        # torchvision accepts five axes only for its Video type. That type means (B, T, 3, H, W), but the order of the
        # middle axes does not matter here: samples are mixed whole, or in a rectangle of the last two axes.
        inputs = tv_tensors.Video(inputs)
    mixed, shares = v2.RandomChoice(kinds)(inputs, labels)
    return mixed.as_subclass(Tensor), shares

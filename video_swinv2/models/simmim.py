"""SimMIM (arXiv 2111.09886): predict the pixels under a random mask, through a one-layer head.

Letters: B batch, C channels, *S token grid, *U mask cells per axis, *P pixels (and frames) per axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.models.swinv2 import Axes, SwinV2, per_axis


class SimMIM(nn.Module):
    """A SwinV2 encoder with a mask token and a pixel decoder; state-dict names are the official ones.

    mask_unit: the side of a mask cell in pixels, an int for every axis or one value per axis; a multiple of the patch.
    """

    def __init__(self, encoder: SwinV2, mask_unit: Axes = 32) -> None:
        super().__init__()
        patch = encoder.patch_size
        self.mask_unit = per_axis("mask_unit", mask_unit, len(patch))
        if any(unit % p for unit, p in zip(self.mask_unit, patch, strict=True)):
            raise ValueError(f"mask_unit: {self.mask_unit} is not a multiple of the patch {patch}")
        merged = 2 ** (len(encoder.depths) - 1)
        self.stride = (*patch[:-2], patch[-2] * merged, patch[-1] * merged)
        encoder.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.embed_dim), std=0.02))
        self.encoder = encoder
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.decoder = nn.Sequential(convolution(encoder.num_features, 3 * math.prod(self.stride), kernel_size=1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, *P) and the mask (B, *U) bool, True = hidden -> predicted pixels (B, 3, *P)."""
        tokens = self.encoder.embed(x)
        per_cell = [unit // p for unit, p in zip(self.mask_unit, self.encoder.patch_size, strict=True)]
        hidden = grow(mask, per_cell, tokens.shape[1:-1])[..., None]
        mask_token = self.encoder.get_parameter("mask_token").to(tokens.dtype)
        features = self.encoder.encode(torch.where(hidden, mask_token, tokens))
        pixels = pixel_shuffle(self.decoder(features.movedim(-1, 1)), self.stride)
        for axis, size in enumerate(x.shape[2:], start=2):
            pixels = pixels.narrow(axis, 0, size)
        return pixels


def mask_cells(size: Axes, mask_unit: Axes, axes: int) -> tuple[int, ...]:
    """Mask cells per axis for an input of `size` pixels; the last cell may be cut by the border."""
    pairs = zip(per_axis("size", size, axes), per_axis("mask_unit", mask_unit, axes), strict=True)
    return tuple(math.ceil(pixels / unit) for pixels, unit in pairs)


def tube_unit(mask_unit: Axes, frames: int, patch_frames: int) -> tuple[int, ...]:
    """The cell (T, H, W) as long as a clip of `frames`: whole patches in time, in space as `mask_unit` says."""
    return (math.ceil(frames / patch_frames) * patch_frames, *per_axis("mask_unit", mask_unit, 3)[1:])


def hidden_cells(cells: tuple[int, ...], ratio: float) -> int:
    """ceil(ratio * cells), where 0.55 of 20 is 11: as floats multiply it would be a little more."""
    return math.ceil(round(ratio * math.prod(cells), 6))


def random_mask(cells: tuple[int, ...], ratio: float, generator: torch.Generator) -> Tensor:
    """A mask (*cells) bool with exactly `hidden_cells` True, every choice of them equally likely."""
    count = math.prod(cells)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: hidden_cells(cells, ratio)]] = True
    return mask.view(cells)


def grow(mask: Tensor, factors: list[int] | tuple[int, ...], size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, *U) -> (B, *size): every cell repeated `factors` times along its axis, cut to `size`."""
    for axis, (factor, length) in enumerate(zip(factors, size, strict=True), start=1):
        mask = mask.repeat_interleave(factor, dim=axis).narrow(axis, 0, length)
    return mask


def pixel_shuffle(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, C * prod(factors), *S) -> (B, C, *(S * factors)); torch's PixelShuffle for any number of axes."""
    batch, channels, *grid = x.shape
    axes = len(factors)
    x = x.view(batch, channels // math.prod(factors), *factors, *grid)
    order = [axis for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for axis in pair]
    return x.permute(0, 1, *order).reshape(batch, -1, *[g * f for g, f in zip(grid, factors, strict=True)])


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, mask_unit: tuple[int, ...]) -> Tensor:
    """Mean absolute error over hidden pixels and channels: (B, 3, *P) twice and the mask (B, *U) -> scalar."""
    hidden = grow(mask, mask_unit, target.shape[2:])[:, None].to(target.dtype)
    error = (prediction.to(target.dtype) - target).abs() * hidden
    return error.sum() / (hidden.sum() + 1e-5) / target.shape[1]


def masked_mean(target: Tensor, mask: Tensor, mask_unit: tuple[int, ...]) -> Tensor:
    """The mean of each sample's hidden pixels, per channel, as a prediction: (B, 3, *P) and (B, *U) -> (B, 3, 1, ...).

    What a model has to beat: it knows the colours of what is hidden, and nothing of where they are.
    """
    hidden = grow(mask, mask_unit, target.shape[2:])[:, None].to(target.dtype)
    axes = tuple(range(2, target.ndim))
    return (target * hidden).sum(axes, keepdim=True) / hidden.sum(axes, keepdim=True)


def normalise_target(x: Tensor, patch: int = 47) -> Tensor:
    """Each pixel by mean and deviation of its `patch` x `patch` surroundings, per channel: (B, 3, ..., H, W).

    The window (odd) is cut at the border, the variance is unbiased, as in the official SwinV2 recipes. Frames of a clip
    are normalised one by one.
    """
    mean, deviation = _surroundings(x, patch)
    return (x - mean) / deviation


def restore_target(prediction: Tensor, x: Tensor, patch: int) -> Tensor:
    """The inverse of `normalise_target`: what was predicted for the target of `x` as pixels, by x's own statistics."""
    mean, deviation = _surroundings(x, patch)
    return prediction * deviation + mean


def _surroundings(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the window around each pixel, both in the shape of `x`."""
    images = x.reshape(-1, 1, *x.shape[-2:])
    count = _window_mean(torch.ones_like(images[:1]), patch, count_padding=True) * patch**2
    mean, square = _window_mean(images, patch), _window_mean(images**2, patch)
    variance = ((square - mean**2) * count / (count - 1)).clamp(min=0)
    return mean.view_as(x), (variance + 1e-6).sqrt().view_as(x)


def _window_mean(images: Tensor, patch: int, count_padding: bool = False) -> Tensor:
    """Mean over the window around each pixel of (B, 1, H, W): over rows, then columns, since the work of a CPU grows
    with the size of the window (at 47 x 47 this is 20 times as fast)."""
    rows = F.avg_pool2d(images, (1, patch), 1, (0, patch // 2), count_include_pad=count_padding)
    return F.avg_pool2d(rows, (patch, 1), 1, (patch // 2, 0), count_include_pad=count_padding)

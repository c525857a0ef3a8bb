"""SimMIM pre-training (arXiv 2111.09886): predict masked pixels with a SwinV2 encoder and a one-layer decoder.

Letters: B batch, C channels, *S token grid, *U mask cells per axis, *P pixels (and frames) per axis.

The mask is drawn in cells, which are larger than patches (32 pixels in the paper). A hidden cell hides all its patches:
before the encoder, their tokens are replaced by one learned mask token. From each token of the last stage, the decoder
predicts all pixels that the token covers. For an image of 192 x 192 pixels with patches of 4 and cells of 32:

    mask      (B, 6, 6) cells -> (B, 48, 48) tokens                 `upsample_mask`
    encoder   (B, 48, 48, C) -> (B, 6, 6, 8C)                       three mergings
    decoder   (B, 8C, 6, 6) -> (B, 3 * 32 * 32, 6, 6) -> (B, 3, 192, 192)
    loss      L1 over hidden pixels                                 `masked_l1`
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2, per_axis


class SimMIM(nn.Module):
    """A SwinV2 encoder with a mask token and a pixel decoder. State-dict names are those of Microsoft's SimMIM.

    mask_unit: the side of a mask cell in pixels (and frames), as an int for every axis or one value per axis. Raises
    ValueError unless it is a multiple of the patch size.
    """

    def __init__(self, encoder: SwinV2, mask_unit: IntOrPerAxis = 32) -> None:
        super().__init__()
        patch = encoder.patch_size
        self.mask_unit = per_axis("mask_unit", mask_unit, len(patch))
        if any(unit % p for unit, p in zip(self.mask_unit, patch, strict=True)):
            raise ValueError(f"mask_unit: {self.mask_unit} is not a multiple of the patch {patch}")
        # The stride is the size, in pixels and frames, that one token of the last stage covers. Height and width are
        # merged after every stage but the last, and time never is.
        merged = 2 ** (len(encoder.depths) - 1)
        self.stride = (*patch[:-2], patch[-2] * merged, patch[-1] * merged)
        # The mask token is registered on the encoder, because its official name is `encoder.mask_token`.
        encoder.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.embed_dim), std=0.02))
        self.encoder = encoder
        # A 1 x 1 convolution is a Linear on every token. Its outputs are (channel, *stride) for `pixel_shuffle`.
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.decoder = nn.Sequential(
            convolution(encoder.num_features, encoder.in_chans * math.prod(self.stride), kernel_size=1)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, 3, *P) and mask (B, *U) bool, True where hidden -> predicted pixels (B, 3, *P)."""
        tokens = self.encoder.embed(x)
        per_cell = [unit // p for unit, p in zip(self.mask_unit, self.encoder.patch_size, strict=True)]
        hidden = upsample_mask(mask, per_cell, tokens.shape[1:-1])[..., None]  # (B, *S, 1)
        mask_token = self.encoder.get_parameter("mask_token").to(tokens.dtype)
        # (B, *S, C) with hidden tokens replaced -> (B, *S', C') of the last stage -> channels first -> (B, 3, *P)
        features = self.encoder.encode(torch.where(hidden, mask_token, tokens))
        pixels = pixel_shuffle(self.decoder(features.movedim(-1, 1)), self.stride)
        # The encoder padded its grids to whole patches and mergings. Predictions outside the input are cut off.
        for axis, size in enumerate(x.shape[2:], start=2):
            pixels = pixels.narrow(axis, 0, size)
        return pixels


def mask_cells(size: IntOrPerAxis, mask_unit: IntOrPerAxis, axes: int) -> tuple[int, ...]:
    """Mask cells per axis for an input of `size` pixels. The last cell of an axis may extend past the border."""
    pairs = zip(per_axis("size", size, axes), per_axis("mask_unit", mask_unit, axes), strict=True)
    return tuple(math.ceil(pixels / unit) for pixels, unit in pairs)


def tube_unit(mask_unit: IntOrPerAxis, frames: int, patch_frames: int) -> tuple[int, ...]:
    """The mask cell (T, H, W) for tube masking: it spans the whole clip, and its H and W are those of `mask_unit`.

    T is `frames` rounded up to whole patches.
    """
    return (math.ceil(frames / patch_frames) * patch_frames, *per_axis("mask_unit", mask_unit, 3)[1:])


def hidden_cells(cells: tuple[int, ...], ratio: float) -> int:
    """The number of cells to hide, ceil(ratio * number of cells)."""
    # Rounded before `ceil`, because 0.55 * 20 is slightly above 11 in floating point.
    return math.ceil(round(ratio * math.prod(cells), 6))


def random_mask(cells: tuple[int, ...], ratio: float, generator: torch.Generator) -> Tensor:
    """A uniformly drawn bool mask of shape `cells`, in which exactly `hidden_cells` cells are True (hidden)."""
    count = math.prod(cells)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: hidden_cells(cells, ratio)]] = True
    return mask.view(cells)


def upsample_mask(mask: Tensor, factors: list[int] | tuple[int, ...], size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, *U) -> (B, *size): repeat every cell `factors` times along each axis, then cut to `size`.

    The factors are tokens per cell for a mask of tokens, and pixels per cell for a mask of pixels.
    """
    for axis, (factor, length) in enumerate(zip(factors, size, strict=True), start=1):
        mask = mask.repeat_interleave(factor, dim=axis).narrow(axis, 0, length)
    return mask


def pixel_shuffle(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, C * prod(factors), *S) -> (B, C, *(S * factors)). This is torch's PixelShuffle for any number of axes."""
    batch, channels, *grid = x.shape
    axes = len(factors)
    # 2-D: (B, C * f * g, H, W) -> (B, C, f, g, H, W) -> (B, C, H, f, W, g) -> (B, C, H * f, W * g)
    x = x.view(batch, channels // math.prod(factors), *factors, *grid)
    # Each grid axis is followed by its factor. Grid axes start at 2 + axes, factors at 2.
    order = [axis for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for axis in pair]
    return x.permute(0, 1, *order).reshape(batch, -1, *[g * f for g, f in zip(grid, factors, strict=True)])


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, mask_unit: tuple[int, ...]) -> Tensor:
    """Mean absolute error over hidden pixels and channels: two tensors (B, 3, *P) and the mask (B, *U) -> scalar.

    The 1e-5 in the denominator is Microsoft's.
    """
    # (B, *U) -> (B, 1, *P), shared by the channels. Its sum counts pixels, hence the division by the 3 channels.
    hidden = upsample_mask(mask, mask_unit, target.shape[2:])[:, None].to(target.dtype)
    error = (prediction.to(target.dtype) - target).abs() * hidden
    return error.sum() / (hidden.sum() + 1e-5) / target.shape[1]


def masked_mean(target: Tensor, mask: Tensor, mask_unit: tuple[int, ...]) -> Tensor:
    """The mean colour of each sample's hidden pixels: (B, 3, *P) and mask (B, *U) -> (B, 3, 1, ...).

    Used as a prediction, it is the baseline that a model has to beat, with correct average colours but no structure.
    """
    hidden = upsample_mask(mask, mask_unit, target.shape[2:])[:, None].to(target.dtype)
    axes = tuple(range(2, target.ndim))
    return (target * hidden).sum(axes, keepdim=True) / hidden.sum(axes, keepdim=True)


def normalise_target(x: Tensor, patch: int = 47) -> Tensor:
    """Normalise each pixel by the mean and standard deviation of the `patch` x `patch` square around it, per channel.

    Takes and returns (B, 3, ..., H, W). `patch` must be odd. As in Microsoft's SwinV2 recipes, the square is cut off at
    the image border and the variance is unbiased. The frames of a clip are normalised one by one.
    """
    mean, deviation = _local_statistics(x, patch)
    return (x - mean) / deviation


def restore_target(prediction: Tensor, x: Tensor, patch: int) -> Tensor:
    """The inverse of `normalise_target`: turn a predicted target into pixels, using the statistics of `x`."""
    mean, deviation = _local_statistics(x, patch)
    return prediction * deviation + mean


def _local_statistics(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the square around each pixel, both in the shape of `x`."""
    images = x.reshape(-1, 1, *x.shape[-2:])  # (B * 3 * ..., 1, H, W)
    # The number of pixels of each square that lie inside the image: with zero padding counted, the mean of ones is
    # their share. It depends only on the position, so one image (1, 1, H, W) is enough.
    count = _square_mean(torch.ones_like(images[:1]), patch, count_padding=True) * patch**2
    mean, square = _square_mean(images, patch), _square_mean(images**2, patch)
    # E[x^2] - E[x]^2 with Bessel's correction. Rounding can make it slightly negative, hence the clamp. The 1e-6 below
    # is Microsoft's.
    variance = ((square - mean**2) * count / (count - 1)).clamp(min=0)
    return mean.view_as(x), (variance + 1e-6).sqrt().view_as(x)


def _square_mean(images: Tensor, patch: int, count_padding: bool = False) -> Tensor:
    """Mean over the square around each pixel of (B, 1, H, W); `count_padding` includes the zeros outside the image.

    It averages along rows first and then along columns, which is the same, because the part of a square that lies
    inside the image is a rectangle. On CPUs the cost of pooling grows with the area of its window, and at 47 x 47 two
    passes are 20 times as fast.
    """
    rows = F.avg_pool2d(images, (1, patch), 1, (0, patch // 2), count_include_pad=count_padding)
    return F.avg_pool2d(rows, (patch, 1), 1, (patch // 2, 0), count_include_pad=count_padding)

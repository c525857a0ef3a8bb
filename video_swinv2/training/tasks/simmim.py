"""The SimMIM pre-training task (arXiv 2111.09886) on images, frames of videos or clips, and the pictures it draws.

Letters: B samples, *P pixels per axis (for clips T frames first), *U mask cells per axis, R rows of a picture.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from video_swinv2.config import Config, MaskConfig
from video_swinv2.data.datasets import Batch, SampleDataset, collate
from video_swinv2.data.sources import unlabelled_mixture
from video_swinv2.data.transforms import GREY, denormalise
from video_swinv2.errors import UsageError
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from video_swinv2.models.simmim import (
    SimMIM,
    hidden_cells,
    mask_cells,
    masked_l1,
    masked_mean,
    normalise_target,
    restore_target,
    tube_unit,
    upsample_mask,
)
from video_swinv2.models.swinv2 import SwinV2, per_axis
from video_swinv2.training.flops import training_flops
from video_swinv2.training.tasks.base import (
    GAP,
    Construction,
    Forward,
    Tally,
    averages,
    build_model,
    contact_sheet,
    in_one_process,
    normalised_pixels,
    sample_kind,
    save_task_model,
    source_facts,
)

PICTURE_IMAGES, PICTURE_CLIPS = 8, 2  # how many validation samples a picture shows
ROW_NAMES = ("original", "masked", "predicted")
MIN_FONT, FONTS_PER_TILE = 9, 14  # pixels; the names of the rows of higher tiles are larger


class Pretraining:
    """Trains encoder, mask token and decoder to predict the pixels under a random mask; see `base.Task`."""

    metrics: Mapping[str, bool] = MappingProxyType({"val/loss": False})
    classes = None
    notes = ()

    def __init__(self, config: Config, construction: Construction = in_one_process) -> None:
        self.config = config
        self.name = f"SimMIM on {sample_kind(config)}"
        # These keys mean nothing here, and ignoring them silently would hide a mistake in the config.
        for key, default in (("frozen_stages", 0), ("class_weights", None), ("backbone_lr", 1.0)):
            if getattr(config.optim, key) != default:
                raise UsageError(f"optim.{key}: is for `train`; omit it in `pretrain`")
        train = unlabelled_mixture(config.data, validation=False, repeats=config.augment.repeats)
        val = unlabelled_mixture(config.data, validation=True)
        self.data_facts: dict[str, object] = {
            "source": source_facts(config),
            "samples": len(train),
            "val_samples": len(val),
            "data_fingerprint": train.fingerprint,
            "val_fingerprint": val.fingerprint,
        }
        with construction(self.data_facts):
            self.encoder = build_model(config, 0)  # no classes, hence no head
            mask = resolved_mask(config, self.encoder)
            self.mask_unit = per_axis("mask_unit", mask.unit, len(self.encoder.patch_size))
            self.module: nn.Module = SimMIM(self.encoder, self.mask_unit)
        self.train_samples = SampleDataset(train, config.data, config.augment, config.seed, mask)
        # Without augmentation a sample and its mask depend only on the seed and the position in the list. So every
        # validation of this run, and of other runs with this seed, hides the same pixels, and losses can be compared.
        self.val_samples: SampleDataset | None = SampleDataset(val, config.data, None, config.seed, mask)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The mean absolute error over the hidden pixels of a micro-batch."""
        inputs, masks, target = self._inputs(batch)
        return masked_l1(forward(inputs, masks), target, masks, self.mask_unit)

    def tally(self, forward: Forward, batch: Batch) -> Tally:
        """The summed loss of each sample, for the model and for `masked_mean`, the baseline that it has to beat."""
        inputs, masks, target = self._inputs(batch)
        predictions = {"loss": forward(inputs, masks), "mean_loss": masked_mean(target, masks, self.mask_unit)}
        sums = {"samples": float(len(inputs))}
        for key, prediction in predictions.items():
            # One sample at a time. Cells at the border may be cut off, so samples may hide different numbers of pixels,
            # and the mean over a whole batch would depend on which samples happen to share it.
            samples = zip(prediction.split(1), target.split(1), masks.split(1), strict=True)
            sums[key] = sum(float(masked_l1(p, t, m, self.mask_unit)) for p, t, m in samples)
        return sums

    def figures(self, tally: Tally) -> dict[str, float]:
        """The means over all samples."""
        return averages(tally)

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """The same few validation samples at every call, as original, masked and predicted: (3, H, W) uint8."""
        if self.val_samples is None:
            return None
        inputs, masks, _ = self._inputs(picture_samples(self.val_samples).to(device))
        prediction = forward(inputs, masks).float()
        if self.config.mask.normalise_target:
            # The model predicts each pixel relative to the mean and deviation of its surroundings, but not these
            # statistics themselves. They are taken from the original here, so brightness, colour and contrast of the
            # reconstruction are partly the original's.
            prediction = restore_target(prediction, inputs, self.config.mask.normalise_target)
        # (B, *U) -> (B, *P)
        hidden = upsample_mask(masks, self.mask_unit, inputs.shape[2:])
        original, reconstructed = (denormalise(x, IMAGENET_MEAN, IMAGENET_STD) for x in (inputs, prediction))
        return draw_reconstruction(original, reconstructed, hidden).cpu()

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels (B, 3, *P), masks (B, *U) and target (B, 3, *P) of a micro-batch."""
        if batch.masks is None:
            raise TypeError("SimMIM needs samples with masks")
        inputs, patch = normalised_pixels(batch), self.config.mask.normalise_target
        return inputs, batch.masks, normalise_target(inputs, patch) if patch else inputs

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file with encoder, mask token and decoder; it names no classes."""
        save_task_model(self.module, path, (), self.config, weights, provenance)

    def training_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass."""
        return training_flops(self.encoder, pretraining=True)

    def next_command(self, folder: Path) -> str:
        """The command that fine-tunes from the best weights."""
        return f"video-swinv2 train CONFIG.yaml init={shlex.quote(str(folder / 'model.safetensors'))}"


def resolved_mask(config: Config, encoder: SwinV2) -> MaskConfig:
    """The mask settings with `unit` as one size per axis; for tubes a cell is as long as the clip.

    Raises UsageError, naming the key, for tubes in images, for cells that are not whole patches, and for a mask that
    would hide everything.
    """
    mask, data, patch = config.mask, config.data, encoder.patch_size
    if mask.shape == "tube" and data.frames is None:
        raise UsageError("mask.shape: a tube is for clips; set data.frames, or omit mask.shape")
    try:
        unit = per_axis("mask.unit", mask.unit, len(patch))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if mask.shape == "tube" and data.frames is not None:
        unit = tube_unit(unit, data.frames, patch[0])
    if any(cell % side for cell, side in zip(unit, patch, strict=True)):
        raise UsageError(f"mask.unit: {list(unit)} is not a multiple of the model's patch {list(patch)}")
    pixels = encoder.image_size if data.frames is None else (data.frames, *encoder.image_size)
    cells = mask_cells(pixels, unit, len(patch))
    # The number of hidden cells is rounded up, so with few large cells it may reach all of them.
    if hidden_cells(cells, mask.ratio) == math.prod(cells):
        raise UsageError(f"mask.unit: all {math.prod(cells)} cells would be hidden; use a smaller unit or ratio")
    return dataclasses.replace(mask, unit=unit)


def picture_samples(samples: SampleDataset) -> Batch:
    """A few validation samples, spread evenly over the list and the same at every call."""
    count = min(len(samples), PICTURE_IMAGES if samples.data.frames is None else PICTURE_CLIPS)
    return collate([samples[(0, index * len(samples) // count)] for index in range(count)])


def draw_reconstruction(original: Tensor, reconstructed: Tensor, hidden: Tensor) -> Tensor:
    """Two times (B, 3, *P) uint8 and the mask (B, *P) bool, True where hidden -> one picture (3, H, W) uint8.

    The picture has three rows, each with its name at the left: the original, the original with its hidden pixels in
    grey, and the original with its hidden pixels as predicted. Images stand side by side. Each clip has three rows of
    its own, with its frames from left to right.
    """
    # (3,) -> (1, 3, 1, ...), to broadcast over samples, frames and pixels.
    grey = torch.tensor(GREY, dtype=torch.uint8, device=original.device).view(1, 3, *[1] * (original.ndim - 2))
    masked, rebuilt = (torch.where(hidden[:, None], filling, original) for filling in (grey, reconstructed))
    sheet = contact_sheet([original, masked, rebuilt])
    return torch.cat([name_rows(ROW_NAMES, original.shape[-2], sheet.shape[1]).to(sheet.device), sheet], dim=2)


def name_rows(names: Sequence[str], tile_height: int, height: int) -> Tensor:
    """A white margin (3, height, W) uint8 with the name of each row of tiles of a contact sheet, repeated downwards."""
    font = ImageFont.load_default(max(MIN_FONT, tile_height // FONTS_PER_TILE))
    width = math.ceil(max(font.getlength(name) for name in names)) + 3 * GAP
    margin = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(margin)
    for top, name in zip(range(0, height, tile_height + GAP), cycle(names), strict=False):
        # "rm": the text ends at the tiles, and its middle is that of the row.
        draw.text((width - 2 * GAP, top + tile_height / 2), name, fill="black", font=font, anchor="rm")
    return torch.from_numpy(np.array(margin)).permute(2, 0, 1)  # (height, W, 3) -> (3, height, W)

"""The semantic segmentation task: UPerNet on images whose pixels have classes.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from video_swinv2.config import AugmentConfig, Config
from video_swinv2.data.datasets import UNREADABLE_LABEL, Batch, SampleDataset, Target, collate
from video_swinv2.data.manifest import class_list_hash
from video_swinv2.dense.segmentation_data import SegmentationData, read_segmentation_data, segmentation_splits
from video_swinv2.dense.segmentation_metrics import confusion_matrix, segmentation_figures
from video_swinv2.dense.segmentation_pictures import colour_map
from video_swinv2.dense.segmentation_transforms import SegmentationAugment, scaled_size
from video_swinv2.dense.segmenters import Segmenter, SegmenterDesign, pixel_loss
from video_swinv2.dense.upernet import AuxiliaryHead, UPerHead, enlarged
from video_swinv2.engine.optimizer import freeze_stages
from video_swinv2.errors import UsageError
from video_swinv2.training.class_weights import class_weights
from video_swinv2.training.flops import count_forward_flops, training_flops
from video_swinv2.training.tasks.base import (
    Construction,
    Forward,
    Tally,
    build_model,
    command_to_test,
    contact_sheet,
    in_one_process,
    normalised_pixels,
    save_task_model,
    source_facts,
)

PICTURES = 4  # validation images in a picture
# Keys that mean nothing here. Ignoring them silently would hide a mistake in the config.
UNUSED_AUGMENTATION = ("crop_area", "crop_ratio", "rand_augment", "erasing", "mixup", "cutmix")
UNUSED_OPTIMISATION = (("label_smoothing", 0.0),)


class Segmentation:
    """Trains a SwinV2 with the heads of UPerNet on images and masks; see `base.Task` for the members.

    Training sees random crops. A validation sees whole images one by one, scaled to `data.short_side` if that is set,
    and compares with the masks at their own size.
    """

    metrics: Mapping[str, bool] = MappingProxyType({"val/miou": True, "val/pixel_accuracy": True, "val/loss": False})
    notes: Sequence[str] = ()

    def __init__(self, config: Config, construction: Construction = in_one_process) -> None:
        self.config = config
        self.name = "semantic segmentation of images"
        _refuse_unused(config)
        source, settings = os.fspath(config.data.source[0]), config.segmentation
        train = _read(config, config.data.train_split)
        splits = segmentation_splits(source)
        val = _read(config, config.data.val_split) if config.data.val_split in splits else None
        # Where nothing was set aside for the test, the command that comes next tests on the validation split.
        self._test_split = config.data.val_split if val and "test" not in splits else "test"
        # Every file is checked here, because a run would otherwise meet a wrong one only when the epoch reaches it.
        fingerprint, val_fingerprint = train.check(), val.check() if val else None
        self.classes = train.classes
        self.class_weights = class_weights(config.optim.class_weights, self.classes, train.count_pixels, "pixel")
        self.train_samples = self._samples(train, config.augment)
        self.val_samples = self._samples(val, None) if val else None
        self.data_facts: dict[str, object] = {
            "source": source_facts(config),
            "samples": len(self.train_samples),
            "val_samples": len(val.entries) if val else 0,
            "data_fingerprint": fingerprint,
            "val_fingerprint": val_fingerprint,
            "classes": len(self.classes),
            "classes_sha256": class_list_hash(self.classes),
            # A test reads the masks in the same way.
            "ignore_index": settings.ignore_index,
            "reduce_zero_label": settings.reduce_zero_label,
        }
        self.design = SegmenterDesign(
            len(self.classes),
            settings.channels,
            auxiliary=settings.auxiliary > 0,
            dropout=config.model.head_dropout,
            short_side=config.data.short_side,
        )
        with construction(self.data_facts):
            self.encoder = build_model(config, 0, features_only=True)
            self.module: nn.Module = Segmenter(self.encoder, self.design)
        freeze_stages(self.encoder, config.optim.frozen_stages)

    def _samples(self, data: SegmentationData, augment: AugmentConfig | None) -> SampleDataset:
        config, settings = self.config, self.config.segmentation
        crop = None
        if augment is not None:
            size = config.data.image_size
            height, width = (size, size) if isinstance(size, int) else size
            crop = SegmentationAugment(
                (height, width),
                short_side=config.data.short_side,
                scale=settings.scale,
                max_class_share=settings.max_class_share,
                flip=augment.flip,
                photometric=settings.photometric,
            )
        annotations = MaskAnnotations(data, crop, config.data.short_side)
        return SampleDataset(data.entries, config.data, augment, config.seed, None, annotations)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The cross-entropy of the main head, plus that of the auxiliary head times its weight."""
        images = normalised_pixels(batch)
        masks = torch.stack([target["mask"] for target in batch.targets]).long()
        weights = None if self.class_weights is None else self.class_weights.to(images.device, non_blocking=True)
        losses = forward(images, masks, weights)
        loss: Tensor = losses["loss"]
        if "auxiliary_loss" in losses:
            loss = loss + self.config.segmentation.auxiliary * losses["auxiliary_loss"]
        return loss

    def tally(self, forward: Forward, batch: Batch) -> Tally:
        """The summed loss of the main head and the confusion matrix, int64 (K, K + 1)."""
        sums: Tally = {"samples": len(batch.targets), "loss": 0.0, "confusion": torch.zeros((), dtype=torch.int64)}
        logits = batch.images(forward(normalised_pixels(batch)).float())
        for found, target, label in zip(logits, batch.targets, batch.labels.tolist(), strict=True):
            mask, predicted = target["mask"], None
            if label != UNREADABLE_LABEL:  # an image that could not be read counts as missed, and has no loss
                found = enlarged(found[None], mask.shape)
                sums["loss"] += float(pixel_loss(found, mask[None].long()))
                predicted = found[0].argmax(dim=0)
            sums["confusion"] = sums["confusion"] + confusion_matrix(predicted, mask, len(self.classes))
        return sums

    def figures(self, tally: Tally) -> dict[str, float]:
        """Loss, mIoU, mean accuracy of the classes, and pixel accuracy."""
        found = segmentation_figures(tally["confusion"])
        values = {
            "miou": found.miou,
            "mean_accuracy": found.mean_accuracy,
            "pixel_accuracy": found.pixel_accuracy,
            "loss": tally["loss"] / tally["samples"],
        }
        # Without any pixel of a class, nothing but the loss is known.
        return {key: value for key, value in values.items() if not math.isnan(value)}

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """A few validation images, with their masks and the predicted ones below: (3, H, W) uint8."""
        if self.val_samples is None:
            return None
        count, size = min(len(self.val_samples), PICTURES), list(self.encoder.image_size)
        rows: list[list[Tensor]] = [[], [], []]
        for number in range(count):
            batch = collate([self.val_samples[(0, number * len(self.val_samples) // count)]]).to(device)
            predicted = forward(normalised_pixels(batch))[0].argmax(dim=0)
            tiles = (
                batch.pixels[0],
                *(colour_map(m, len(self.classes)) for m in (batch.targets[0]["mask"], predicted)),
            )
            for row, tile in zip(rows, tiles, strict=True):
                row.append(TF.resize(tile, size, antialias=True))
        return contact_sheet([torch.stack(row) for row in rows]).cpu()

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file that also contains the class names."""
        save_task_model(self.module, path, self.classes, self.config, weights, provenance)

    def training_flops(self) -> float:
        """Floating-point operations of one crop's forward and backward pass."""
        frozen = self.config.optim.frozen_stages
        return training_flops(self.encoder, frozen_stages=frozen) + 3 * heads_flops(
            self.module, self.encoder.image_size
        )

    def next_command(self, folder: Path) -> str:
        """The command that tests the best weights."""
        return command_to_test(self.config, folder, self._test_split)


@dataclasses.dataclass(frozen=True)
class MaskAnnotations:
    """The masks of a split as `data.datasets.Annotations`: the target of an image is its `mask`, uint8 (H, W)."""

    data: SegmentationData
    augment: SegmentationAugment | None
    """None for a validation."""
    short_side: int | None

    def read(self, label: int) -> Target:
        """See `Annotations`."""
        return {"mask": self.data.read_mask(label)}

    def transform(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """See `Annotations`. In a validation, only the image is scaled: the prediction is enlarged to the mask."""
        if self.augment is not None:
            image, mask = self.augment(image, target["mask"], generator)
            return image, {"mask": mask}
        return TF.resize(image, list(scaled_size(image.shape[-2:], self.short_side)), antialias=True), target


def heads_flops(module: Segmenter | nn.Module, size: Sequence[int]) -> int:
    """Floating-point operations of the heads in one forward pass of a crop of (H, W) pixels.

    The heads are built again on the meta device, because those of the module may be partitioned (ZeRO-3).
    """
    if not isinstance(module, Segmenter):
        raise TypeError(f"a segmentation trains a Segmenter, not a {type(module).__name__}")
    design, channels = module.design, module.backbone.channels
    with torch.device("meta"):
        grids = [[math.ceil(side / stride) for side in size] for stride in module.backbone.strides]
        maps = [torch.empty(1, width, *grid) for width, grid in zip(channels, grids, strict=True)]
        heads: list[nn.Module] = [UPerHead(channels, design.channels, design.num_classes)]
        if design.auxiliary:
            heads.append(AuxiliaryHead(channels, design.channels // 2, design.num_classes))
        return sum([count_forward_flops(head, maps) for head in heads])


def _read(config: Config, split: str) -> SegmentationData:
    settings = config.segmentation
    return read_segmentation_data(
        os.fspath(config.data.source[0]),
        split,
        ignore_index=settings.ignore_index,
        reduce_zero_label=settings.reduce_zero_label,
        max_pixels=config.data.max_pixels,
    )


def _refuse_unused(config: Config) -> None:
    """Raise UsageError, naming the key, for what a segmentation has no use for."""
    if config.data.frames is not None:
        raise UsageError("data.frames: segmentation is of images; omit the key")
    if len(config.data.source) != 1:
        raise UsageError(f"data.source: segmentation takes one data set, not {len(config.data.source)}")
    plain = AugmentConfig()
    for key in UNUSED_AUGMENTATION:
        if getattr(config.augment, key) != getattr(plain, key):
            raise UsageError(f"augment.{key}: is not for segmentation, whose crops `segmentation` sets; omit the key")
    for key, default in UNUSED_OPTIMISATION:
        if getattr(config.optim, key) != default:
            raise UsageError(f"optim.{key}: is not for segmentation; omit the key")

"""The object detection task: Faster, Mask or Cascade Mask R-CNN on images with boxes.

Letters: H W pixels, D detections.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.transforms.v2 import functional as TF

from video_swinv2.config import AugmentConfig, Config
from video_swinv2.data.datasets import UNREADABLE_LABEL, Batch, SampleDataset, Target, collate
from video_swinv2.data.manifest import class_list_hash
from video_swinv2.dense.cascade import POSITIVE_FRACTION
from video_swinv2.dense.detection_data import DetectionData
from video_swinv2.dense.detection_dataset import detection_splits, read_detection_data
from video_swinv2.dense.detection_metrics import ImageDetections, detection_figures, image_detections
from video_swinv2.dense.detection_pictures import draw_detections
from video_swinv2.dense.detection_transforms import DetectionAugment
from video_swinv2.dense.detectors import Detector, DetectorDesign
from video_swinv2.dense.outlines import coco_masks
from video_swinv2.dense.proposals import ASPECT_RATIOS, ProposalHead
from video_swinv2.engine.optimizer import freeze_stages
from video_swinv2.errors import UsageError
from video_swinv2.training.flops import count_forward_flops, training_flops
from video_swinv2.training.tasks.base import (
    Construction,
    Forward,
    Tally,
    build_model,
    command_to_test,
    contact_sheet,
    in_one_process,
    save_task_model,
    source_facts,
)

PICTURES = 4  # validation images in a picture
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")  # of a validation
SHOWN_SCORE = 0.3  # of the least sure detection in a picture
SEED = "seed"  # in a target: from which number the anchors and boxes for its losses are drawn
# Keys that mean nothing here. Ignoring them silently would hide a mistake in the config.
UNUSED_AUGMENTATION = ("crop_area", "crop_ratio", "rand_augment", "erasing", "mixup", "cutmix", "repeats")
UNUSED_OPTIMISATION = (("label_smoothing", 0.0), ("class_weights", None))


class Detection:
    """Trains a SwinV2 with the heads of a detector on images and boxes; see `base.Task` for the members.

    Training sees images at sizes drawn at random, or crops of large-scale jitter. A validation sees each image once, at
    `data.image_size`, and compares with the objects in pixels of the image itself.
    """

    def __init__(self, config: Config, construction: Construction = in_one_process) -> None:
        self.config = config
        self.name = "object detection in images"
        _refuse_unused(config)
        coco_masks()  # is needed at the first validation; better to miss it now
        source, settings = os.fspath(config.data.source[0]), config.detection
        train = _read(config, config.data.train_split, None)
        splits = detection_splits(source)
        has_val = config.data.val_split in splits
        self.val_data = _read(config, config.data.val_split, train.classes) if has_val else None
        # Where nothing was set aside for the test, the command that comes next tests on the validation split.
        self._test_split = config.data.val_split if has_val and "test" not in splits else "test"
        # Every image is looked at here, because a run would otherwise meet a wrong one only when the epoch reaches it.
        fingerprint, val_fingerprint = train.check(), self.val_data.check() if self.val_data else None
        self.classes = train.classes
        self.notes: Sequence[str] = (*train.notes, *(self.val_data.notes if self.val_data else ()))
        side, longest = _sides(config)
        self.design = DetectorDesign(
            len(self.classes),
            settings.kind,
            settings.fpn_channels,
            settings.head_channels,
            settings.mask_channels,
            tuple(settings.anchor_sizes),
            settings.proposals,
            settings.sampled_anchors,
            settings.sampled_boxes,
            side,
            longest,
        )
        if self.design.has_masks and not all(data.has_masks for data in (train, self.val_data) if data is not None):
            raise UsageError(
                f"detection.kind: {settings.kind} needs masks, but not every object of {source} has a segmentation; "
                "use faster_rcnn"
            )
        kinds = ("", "mask_") if self.design.has_masks else ("",)
        self.metrics: Mapping[str, bool] = {f"val/{kind}{name}": True for name in ("ap", "ap50") for kind in kinds}
        self.train_samples = self._samples(train, config.augment)
        self.val_samples = self._samples(self.val_data, None) if self.val_data else None
        self.data_facts: dict[str, object] = {
            "source": source_facts(config),
            "samples": len(self.train_samples),
            "val_samples": len(self.val_data) if self.val_data else 0,
            "data_fingerprint": fingerprint,
            "val_fingerprint": val_fingerprint,
            "classes": len(self.classes),
            "classes_sha256": class_list_hash(self.classes),
        }
        with construction(self.data_facts):
            self.encoder = build_model(config, 0, features_only=True)
            self.module: nn.Module = Detector(self.encoder, self.design)
        freeze_stages(self.encoder, config.optim.frozen_stages)

    def _samples(self, data: DetectionData, augment: AugmentConfig | None) -> SampleDataset:
        settings, (side, longest) = self.config.detection, _sides(self.config)
        change = None
        if augment is not None:
            short_sides = settings.short_sides or (side, side)
            if short_sides[1] > longest:
                raise UsageError(
                    f"detection.short_sides: {list(short_sides)} with a longer side of {longest} (data.image_size); "
                    "raise data.image_size, or use smaller sides"
                )
            change = DetectionAugment(short_sides, longest, settings.jitter, longest, augment.flip)
        annotations = BoxAnnotations(data, change, self.design.has_masks)
        return SampleDataset(data.entries, self.config.data, augment, self.config.seed, None, annotations)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The sum of the losses of proposals, boxes and masks, the mean over the images."""
        seeds = [int(target[SEED]) for target in batch.targets]
        losses = forward(batch.images(batch.pixels), batch.targets, True, seeds)
        return torch.stack(list(losses.values())).sum()

    def tally(self, forward: Forward, batch: Batch) -> Tally:
        """What was found in each image, for `figures`."""
        results = forward(batch.images(batch.pixels), None, False, None, False)
        found = []
        for result, target, label in zip(results, batch.targets, batch.labels.tolist(), strict=True):
            place = int(target["place"])
            if label == UNREADABLE_LABEL:  # everything in an image that cannot be read counts as missed
                result = {key: value[:0] for key, value in result.items()}
            found.append(image_detections(place, result, self._val_data.size(place)))
        return {"samples": len(found), "found": found}

    def figures(self, tally: Tally) -> dict[str, float]:
        """COCO's main figures, for boxes and, with the prefix mask_, for masks; without those of nothing to find."""
        found: list[ImageDetections] = tally["found"]
        values: dict[str, float] = {}
        for masks in (False, True) if self.design.has_masks else (False,):
            figures = detection_figures(self._val_data, found, masks=masks).figures
            values |= {f"{'mask_' if masks else ''}{name}": figures[name] for name in FIGURES}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    @property
    def _val_data(self) -> DetectionData:
        if self.val_data is None:
            raise UsageError(
                f"data.val_split: the data set has no split {self.config.data.val_split}; name another one"
            )
        return self.val_data

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """A few validation images with their objects, and below with what was found: (3, H, W) uint8."""
        if self.val_samples is None:
            return None
        count, size = min(len(self.val_samples), PICTURES), list(self.encoder.image_size)
        rows: list[list[Tensor]] = [[], []]
        for number in range(count):
            batch = collate([self.val_samples[(0, number * len(self.val_samples) // count)]]).to(device)
            found = forward(batch.images(batch.pixels))[0]
            image = batch.pixels[0].cpu()
            truth = self._val_data.target(int(batch.targets[0]["place"]))
            for row, shown in zip(rows, (truth, found), strict=True):
                row.append(TF.resize(draw_detections(image, shown, self.classes, SHOWN_SCORE), size, antialias=True))
        return contact_sheet([torch.stack(row) for row in rows])

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file that also contains the class names."""
        save_task_model(self.module, path, self.classes, self.config, weights, provenance)

    def training_flops(self) -> float:
        """Floating-point operations of the forward and backward pass of an image of `data.image_size`."""
        frozen = self.config.optim.frozen_stages
        heads = heads_flops(self.design, self.encoder.feature_info.channels(), self.encoder.image_size)
        return training_flops(self.encoder, frozen_stages=frozen) + 3 * heads

    def next_command(self, folder: Path) -> str:
        """The command that tests the best weights."""
        return command_to_test(self.config, folder, self._test_split)


@dataclasses.dataclass(frozen=True)
class BoxAnnotations:
    """The objects of a split as `data.datasets.Annotations`.

    A target of training is what the detector takes, and SEED. One of a validation holds only the `place` of the image
    in the data, because the figures are computed from the data itself.
    """

    data: DetectionData
    augment: DetectionAugment | None
    """None for a validation."""
    masks: bool

    def read(self, label: int) -> Target:
        """See `Annotations`."""
        return {"place": torch.tensor(label)} if self.augment is None else self.data.target(label, masks=self.masks)

    def transform(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """See `Annotations`. In a validation, the detector scales the image itself."""
        if self.augment is None:
            return image, target
        image, target = self.augment(image, target, generator)
        # What is drawn for the losses of an image does not depend on which other images its process has.
        seed = torch.randint(2**62, (), generator=generator)
        return image, {key: target[key] for key in ("boxes", "labels", "masks") if key in target} | {SEED: seed}


def heads_flops(design: DetectorDesign, channels: Sequence[int], size: Sequence[int]) -> int:
    """Floating-point operations of all heads in the forward pass of an image of (H, W) pixels.

    channels: of the maps of the backbone. The heads are built again on the meta device, because those of a module may
    be partitioned (ZeRO-3) and because what they are applied to depends on what is found.
    """
    width = design.fpn_channels
    grids = [[math.ceil(side / stride) for side in size] for stride in 4 * 2 ** np.arange(len(channels))]
    with torch.device("meta"):
        maps = {str(n): torch.empty(1, c, *grid) for n, (c, grid) in enumerate(zip(channels, grids, strict=True))}
        fpn = FeaturePyramidNetwork(list(channels), width, LastLevelMaxPool())
        levels = list(fpn(maps).values())
        total = count_forward_flops(fpn, maps)
        total += count_forward_flops(ProposalHead(width, len(ASPECT_RATIOS)), levels)
        boxes = torch.empty(design.sampled_boxes, width, 7, 7)
        stages = 3 if design.kind == "cascade_mask_rcnn" else 1
        total += stages * count_forward_flops(TwoMLPHead(width * 7**2, design.head_channels), boxes)
        if design.has_masks:
            masked = torch.empty(round(design.sampled_boxes * POSITIVE_FRACTION), width, 14, 14)
            total += count_forward_flops(MaskRCNNHeads(width, (design.mask_channels,) * 4, 1), masked)
            hidden = torch.empty(len(masked), design.mask_channels, 14, 14)
            predictor = MaskRCNNPredictor(design.mask_channels, design.mask_channels, design.num_classes + 1)
            total += count_forward_flops(predictor, hidden)
    return total


def _sides(config: Config) -> tuple[int, int]:
    """The shorter side of an image as the model sees it, and the limit of its longer side, in pixels."""
    size = config.data.image_size
    low, high = sorted((size, size) if isinstance(size, int) else size)
    return low, high


def _read(config: Config, split: str, classes: Sequence[str] | None) -> DetectionData:
    source = os.fspath(config.data.source[0])
    return read_detection_data(source, split, classes=classes, drop_faulty=config.detection.drop_faulty)


def _refuse_unused(config: Config) -> None:
    """Raise UsageError, naming the key, for what a detection has no use for."""
    if config.data.frames is not None:
        raise UsageError("data.frames: detection is in images; omit the key")
    if len(config.data.source) != 1:
        raise UsageError(f"data.source: detection takes one data set, not {len(config.data.source)}")
    if config.data.short_side is not None:
        raise UsageError("data.short_side: is not for detection, whose sizes are data.image_size; omit the key")
    plain = AugmentConfig()
    for key in UNUSED_AUGMENTATION:
        if getattr(config.augment, key) != getattr(plain, key):
            raise UsageError(f"augment.{key}: is not for detection, whose augmentation `detection` sets; omit the key")
    for key, default in UNUSED_OPTIMISATION:
        if getattr(config.optim, key) != default:
            raise UsageError(f"optim.{key}: is not for detection; omit the key")
    if config.model.head_dropout:
        raise UsageError("model.head_dropout: a detector has no dropout; omit the key")
    if config.detection.jitter is not None and config.detection.short_sides is not None:
        raise UsageError("detection.jitter, short_sides: each is a way to choose the size; omit one of them")

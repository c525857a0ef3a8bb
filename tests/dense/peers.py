"""What the same minutes of one CPU core make of torchvision's models from scratch, beside the recipes for laptops.

    python -m tests.dense.peers detection data/bccd --minutes 32 --out peer.json
    python -m tests.dense.peers segmentation data/camvid --minutes 40 --out peer.json

Faster R-CNN on a ResNet-18 with feature pyramid beside configs/bccd/nano.yaml, and LR-ASPP on a MobileNetV3-Large
beside configs/camvid/nano.yaml. Data, sizes, augmentation, batch, optimiser and figures are those of the recipe; the
widths of the detector's heads and its anchors, too. The rate falls with the CPU time that has passed and not with
steps, because the budget is CPU time. Group norm takes the place of batch norm, which a batch of four serves badly and
which is given up in training from scratch elsewhere, too (arXiv 1811.08883).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.ops import MultiScaleRoIAlign

import video_swinv2 as vs
from video_swinv2.config import OptimConfig, load_config
from video_swinv2.data.transforms import normalise
from video_swinv2.dense.detection_metrics import detection_figures, image_detections
from video_swinv2.dense.detection_transforms import DetectionAugment
from video_swinv2.dense.segmentation_metrics import (
    confusion_matrix,
    image_areas,
    miou_interval,
    segmentation_figures,
)
from video_swinv2.dense.segmentation_transforms import SegmentationAugment, scaled_size
from video_swinv2.dense.segmenters import IGNORE
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

RECIPES = {"detection": "configs/bccd/nano.yaml", "segmentation": "configs/camvid/nano.yaml"}
WARMUP = 0.02  # of the budget


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of about 16 channels."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def with_group_norm(module: nn.Module) -> nn.Module:
    """The module with every batch norm replaced."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, group_norm(part.num_features))
        else:
            with_group_norm(part)
    return module


def batches(data: Dataset[Any], size: int, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
    """Epoch after epoch in new orders, without end."""
    while True:
        yield from DataLoader(data, size, shuffle=True, drop_last=True, collate_fn=collate)


def train(
    model: nn.Module, given: Iterator[Any], loss_of: Callable[[Any], Tensor], recipe: OptimConfig, minutes: float
) -> dict[str, float]:
    """AdamW with warm-up and a cosine over `minutes` of CPU time, reading included."""
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    started, steps = time.process_time(), 0
    while (passed := (time.process_time() - started) / (60 * minutes)) < 1:
        factor = min(passed / WARMUP, 1.0) * (1 + math.cos(math.pi * passed)) / 2
        optimizer.param_groups[0]["lr"] = recipe.lr * max(factor, 1e-3)
        loss = loss_of(next(given))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf)
        optimizer.step()
        steps += 1
        if steps % 50 == 1:
            print(f"step {steps}: {passed:.0%} of the time, loss {float(loss.detach()):.3f}", flush=True)
    return {"steps": steps, "cpu_seconds": time.process_time() - started}


def detection(data: Path, minutes: float) -> dict[str, Any]:
    """Faster R-CNN on a ResNet-18 with feature pyramid."""
    config = load_config(Path(RECIPES["detection"]), [f"data.source={data}"])
    settings, (side, longest) = config.detection, config.data.image_size
    change = DetectionAugment(tuple(settings.short_sides), longest, flip=config.augment.flip)
    train_data = vs.DetectionDataset(data, "train", transform=change)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=group_norm, trainable_layers=5)
    # Its pyramid has the width of the recipe's.
    width, classes = settings.fpn_channels, len(train_data.classes) + 1
    backbone.fpn = type(backbone.fpn)([64, 128, 256, 512], width, backbone.fpn.extra_blocks)
    backbone.out_channels = width
    sizes = tuple((size,) for size in settings.anchor_sizes)
    model = FasterRCNN(
        backbone, min_size=side, max_size=longest,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        box_head=TwoMLPHead(width * 49, settings.head_channels),
        box_predictor=FastRCNNPredictor(settings.head_channels, classes),
        rpn_post_nms_top_n_train=2 * settings.proposals, rpn_post_nms_top_n_test=settings.proposals,
        box_batch_size_per_image=settings.sampled_boxes,
    )  # fmt: skip
    # Training images come scaled by the augmentation; the model must not scale them again.
    scale = model.transform

    def loss_of(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
        images = [image.float() / 255 for image, _ in batch]
        scale.min_size, scale.max_size = (min(min(image.shape[-2:]) for image in images),), longest
        keys = ("boxes", "labels")
        losses = model(images, [{key: target[key] for key in keys} for _, target in batch])
        return torch.stack(list(losses.values())).sum()

    spent = train(model, batches(train_data, config.optim.batch, list), loss_of, config.optim, minutes)
    model.eval()
    scale.min_size, scale.max_size = (side,), longest
    test = vs.DetectionDataset(data, "test", classes=train_data.classes)
    found = []
    with torch.inference_mode():
        for place in range(len(test)):
            image, _ = test[place]
            result = model([image.float() / 255])[0]
            found.append(image_detections(place, result, test.data.size(place)))
    figures = detection_figures(test.data, found, intervals=True)
    return spent | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "figures": figures.figures,
        "intervals": figures.intervals,
        "per_class_ap50": dict(zip(test.classes, figures.classes50, strict=True)),
    }


def segmentation(data: Path, minutes: float) -> dict[str, Any]:
    """LR-ASPP on a MobileNetV3-Large."""
    config = load_config(Path(RECIPES["segmentation"]), [f"data.source={data}"])
    settings, side = config.segmentation, config.data.short_side
    height, width = config.data.image_size
    change = SegmentationAugment(
        (height, width), short_side=side, scale=settings.scale, max_class_share=settings.max_class_share,
        flip=config.augment.flip, photometric=settings.photometric,
    )  # fmt: skip
    read = partial(vs.SegmentationDataset, data, ignore_index=settings.ignore_index)
    train_data, test = read("train", transform=change), read("test")
    model = with_group_norm(
        lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(train_data.classes))
    )

    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, masks = zip(*items, strict=True)
        return normalise(torch.stack(images), IMAGENET_MEAN, IMAGENET_STD), torch.stack(masks).long()

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, masks = batch
        return F.cross_entropy(model(images)["out"], masks, ignore_index=IGNORE)

    spent = train(model, batches(train_data, config.optim.batch, collate), loss_of, config.optim, minutes)
    model.eval()
    matrices = []
    with torch.inference_mode():
        for image, mask in test:
            pixels = normalise(image[None], IMAGENET_MEAN, IMAGENET_STD)
            size = scaled_size(mask.shape, side)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
            scores = F.interpolate(model(pixels)["out"], mask.shape, mode="bilinear").softmax(dim=1)
            matrices.append(confusion_matrix(scores[0].argmax(0), mask, len(test.classes)))
    figures = segmentation_figures(sum(matrices))
    areas = torch.stack([torch.from_numpy(image_areas(matrix)) for matrix in matrices]).numpy()
    return spent | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "miou": figures.miou,
        "interval": list(miou_interval(areas)),
        "pixel_accuracy": figures.pixel_accuracy,
    }


def main() -> None:
    """See the docstring of this module."""
    parser = argparse.ArgumentParser(prog="python -m tests.dense.peers", description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, required=True, help="of CPU time for the training")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {"detection": detection, "segmentation": segmentation}[options.task](options.data, options.minutes)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
